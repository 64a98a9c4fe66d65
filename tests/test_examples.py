"""The examples run on a tiny model and data of one's own."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_trl import preference_pairs, save_tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """Run a script of examples/ with a tiny model, in its own folder."""
    model = save_tiny_model(tmp_path / "model")
    tiny_tokenizer().save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, "--model", model, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["jsonl", "datasets"])
def test_trl_dpo_lora(run_example, tmp_path, capsys, form):
    if form == "jsonl":
        data = tmp_path / "pairs.jsonl"
        data.write_text("\n".join(map(json.dumps, preference_pairs())))
    else:
        data = tmp_path / "pairs"
        preference_pairs().save_to_disk(data)
    run_example("trl_dpo_lora.py", "--data", data, "--steps", 2, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "adapter saved to" in said
    assert "calls=4" in said  # policy and reference, two steps
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as saved:
        assert any("lora_A" in name for name in saved.keys())  # noqa: SIM118


@pytest.mark.filterwarnings("ignore")
def test_demo(run_example, tmp_path, capsys):
    """Table, chart, adapter and answer; the losses of the two runs are the same."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, preference_pairs())))
    run_example("demo.py", "--data", data, "--steps", 3, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    lines = said.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ["step"])
    table = lines[header + 1 : header + 5]
    for line in table[:3]:
        _, plain, shared, tokens, packed, *_ = line.split()
        assert float(plain) == pytest.approx(float(shared), abs=1e-5)
        assert int(packed) < 0.75 * int(tokens)
    assert table[3].split()[0] == "all"
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "patched" / "adapter_model.safetensors").exists()
    assert "answer:" in said
