"""Code blocks of the documents run, and they agree with the library."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from composites import COMPOSITES
from families import FAMILIES, HYBRIDS
from tiny_trl import build_trainer, load, preference_pairs, save_tiny_model, tiny_tokenizer

import hf_prefix_patch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


BATCHES = (ROOT / "docs" / "batches.md").read_text()


@pytest.mark.parametrize("block", python_blocks(README) + python_blocks(BATCHES))
def test_blocks_run(block, tmp_path, monkeypatch):
    """Each block with a tiny model, trainer, tokenizer and file under the names that it uses."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, preference_pairs())))
    trainer = build_trainer(load(save_tiny_model(tmp_path)), tmp_path, lora=True)
    names = {"model": trainer.model, "trainer": trainer, "tokenizer": tiny_tokenizer()}
    exec(block, names)


def test_before_and_after_stand_at_the_top():
    assert "enable_prefix_sharing" in "\n".join(README.splitlines()[:15])


def test_public_names():
    assert sorted(hf_prefix_patch.__all__) == hf_prefix_patch.__all__
    for name in hf_prefix_patch.__all__:
        assert getattr(hf_prefix_patch, name).__doc__
        assert name in hf_prefix_patch.__doc__


def test_changelog_has_the_version():
    assert f"## [{hf_prefix_patch.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_families_in_the_limits_page_are_those_tested():
    page = (ROOT / "docs" / "limits.md").read_text()
    names = {"llama": "Llama", "olmo2": "OLMo2", "qwen3-moe": "Qwen3-MoE", "gpt-oss": "gpt-oss"}
    for family in FAMILIES:
        base = family.removesuffix("-window")
        assert names.get(base, base.capitalize()) in page, family


def test_families_in_the_architectures_page_are_those_tested():
    page = (ROOT / "docs" / "architectures.md").read_text().lower()
    for family in [*HYBRIDS, *COMPOSITES]:
        assert family in page, family


def test_import_needs_no_extra():
    """Nor does it load the trainer module, whose import takes as long as all of the rest."""
    extras = ["accelerate", "datasets", "gguf", "matplotlib", "peft", "trl"]
    code = (
        "import sys\n"
        f"for name in {extras}: sys.modules[name] = None\n"
        "from hf_prefix_patch import *\n"
        "assert 'torch' in sys.modules\n"
        "assert 'transformers.trainer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
