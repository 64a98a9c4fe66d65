"""The documents hold: code blocks run, commands parse, links lead somewhere, tables are whole."""

import ast
import csv
import json
import re
import runpy
import shlex
import socket
import subprocess
import sys
import tomllib
import types
from dataclasses import fields
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import PIL.Image
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from composites import COMPOSITES
from families import FAMILIES, HYBRIDS
from tiny_trl import (
    build_trainer,
    load,
    preference_pairs,
    save_tiny_model,
    save_tiny_vision_model,
    tiny_tokenizer,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.run import get_args_parser as torchrun_parser
from torch.nn.parallel import DistributedDataParallel

import hf_prefix_patch
from hf_prefix_patch import cli
from hf_prefix_patch.attention import BACKENDS
from hf_prefix_patch.switch import CHOICES, VARIABLE, LaunchOptions

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_prefix_patch"
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
RECIPES = DOCS / "recipes.md"
README = PAGES[0].read_text()

# Python blocks that are run elsewhere, or nowhere.
ELSEWHERE = {
    "deepspeed.initialize": "test_wrappers.py, in other words, where DeepSpeed is installed",
}

# What scripts for a GPU say, and what they say here: a tiny model without one, and little time.
SMALLER = {
    "bf16=True,": "bf16=True, use_cpu=True,",
    "max_completion_length=256": "max_completion_length=8",
    "max_steps=100": "max_steps=2",
}


def blocks_of(language, pages=PAGES):
    """Every block of that language in the documents, with its page and line as its name."""
    for page in pages:
        for match in re.finditer(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S):
            line = page.read_text().count("\n", 0, match.start()) + 2
            if not any(mark in match[1] for mark in ELSEWHERE):
                yield pytest.param(match[1], id=f"{page.name}:{line}")


@pytest.fixture
def launched(monkeypatch):
    """The environment of a script that `torchrun` started, in one process."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**place, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:prefix sharing is bypassed. key/value cache by default")
@pytest.mark.filterwarnings("ignore:.*(deprecated|experimental):FutureWarning")
@pytest.mark.parametrize("block", [*blocks_of("python", [x for x in PAGES if x != RECIPES])])
def test_blocks_run(block, tmp_path, monkeypatch, request):
    """Each block with tiny models, trainers, data and files under the names that it uses."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, preference_pairs())))
    path = save_tiny_model(tmp_path)
    trainer = build_trainer(load(path), tmp_path, lora="fully_shard" not in block)
    if "fully_shard" in block or "DistributedDataParallel" in block:
        request.getfixturevalue("one_process")
    axolotl = {"axolotl": {}, "axolotl.integrations": {}}
    axolotl["axolotl.integrations.base"] = {"BasePlugin": object}
    for name, members in axolotl.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
    names = {
        "model": trainer.model,
        "trainer": trainer,
        "tokenizer": tiny_tokenizer(),
        "path": path,
        "pairs": preference_pairs(),
        "ids": torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]]),
        "mask": torch.ones(2, 4, dtype=torch.long),
        "policy": MixedPrecisionPolicy(),
    }
    known = [torch, hf_prefix_patch.enable_prefix_sharing, DistributedDataParallel, fully_shard]
    names |= {x.__name__: x for x in known}
    handle = None
    if "# bypassed" in block:  # of a model that no trainer has told to have no cache
        names["model"] = load(path)
        handle = hf_prefix_patch.enable_prefix_sharing(names["model"])
    exec(block, names)
    if "trainer.train()" in block and "sharing" in names:
        assert names["sharing"].stats.sharing_ratio > 1
    if handle is not None:
        assert (handle.stats.calls, handle.stats.bypassed.total()) == (1, 1)
    if "BasePlugin" in block:
        plugin = names["PrefixSharing"]()
        plugin.post_model_load(None, trainer.model)
        plugin.post_trainer_create(None, trainer)
        trainer.train()


@pytest.mark.filterwarnings("ignore:.*(deprecated|experimental):FutureWarning")
# Of every forward that returns what a linear layer gives; nothing here writes to it.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("script", [*blocks_of("python", [RECIPES])])
def test_recipes_run(script, tmp_path, monkeypatch, request):
    """Each by itself, where a folder `model` and a file `pairs.jsonl` are all there is."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, preference_pairs())))
    save_tiny_model(tmp_path / "model")
    if "vision_model" in script:
        save_vision_model(tmp_path)
    if "init_process_group" in script:
        request.getfixturevalue("launched")
    for large, small in SMALLER.items():
        script = script.replace(large, small)
    names = {"__name__": "__main__"}
    exec(script, names)
    stats = names["sharing"].stats
    assert stats.sharing_ratio > 1.5
    assert set(stats.bypassed) <= ({"key/value cache"} if "GRPO" in script else set())


def save_vision_model(folder):
    """With its processor, and pairs with images beside it."""
    save_tiny_vision_model(folder / "vision_model")
    PIL.Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    pairs = [dict(pair, images=["red.png"]) for pair in preference_pairs()]
    (folder / "pairs_with_images.jsonl").write_text("\n".join(map(json.dumps, pairs)))


def commands(block):
    """The commands of a shell block as lists of words, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("block", [*blocks_of("sh")])
def test_commands_parse(block):
    """Options exist where the command is ours, accelerate's or torchrun's; so do files in this
    repository, targets of make and extras of the package."""
    for words in commands(block):
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            if name == VARIABLE:
                LaunchOptions.parse(value)
        if words[:2] == ["accelerate", "launch"]:
            args = launch_command_parser().parse_args(words[2:])
            words = [args.training_script, *args.training_script_args]
            words = ["python", "-m", *words] if args.module else ["python", *words]
        elif words[0] == "torchrun":
            args = torchrun_parser().parse_args(words[1:])
            words = ["python", "-m", args.training_script, *args.training_script_args]
        if words[:3] == ["python", "-m", "hf_prefix_patch"]:
            words = ["hf-prefix-patch", *words[3:]]
        if words[0] == "hf-prefix-patch":
            assert cli.parse(words[1:]).command
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
        elif words[:2] == ["pip", "install"]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = project["optional-dependencies"]
            ours = {"hf_prefix_patch", *(f"hf_prefix_patch[{extra}]" for extra in extras)}
            brought = {re.match(r"[\w-]+", x)[0] for names in extras.values() for x in names}
            assert words[2] in ours | brought
        else:
            others = ("python", "trl", "llamafactory-cli", "axolotl", "swift", "deepspeed")
            assert words[0] in others
        for word in words:
            assert not word.startswith(("examples/", "benchmarks/")) or (ROOT / word).exists(), word
        if words[0] == "python" and words[1].startswith("benchmarks/"):
            script = (ROOT / words[1]).read_text()
            if re.search(r"from measure import[^)]*\bparse(_call)?\b", script):
                script += (ROOT / "benchmarks" / "measure.py").read_text()
            assert all(f'"{x}"' in script for x in words if x.startswith("--")), words


def test_options_of_the_launcher_are_all_in_its_page():
    page = (ROOT / "docs" / "launcher.md").read_text()
    for field in fields(LaunchOptions):
        flag = field.name.replace("_", "-")
        (row,) = re.findall(rf"^\| `--(?:no-)?{flag}\b.*\| `\"?{field.name}\b.*$", page, flags=re.M)
        for choice in CHOICES.get(field.name, ()) if field.name != "backend" else ():
            assert choice in row
    assert set(CHOICES["backend"]) == {"auto", *BACKENDS}


def anchor(heading):
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        file, _, place = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if place:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
            assert place in map(anchor, headings), link


def pages_of(entries):
    """The pages of a part of the navigation."""
    for (_, below), *_ in map(dict.items, entries):
        yield from pages_of(below) if isinstance(below, list) else [below]


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_every_page_is_in_the_navigation_once():
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES[1:]]
    assert sorted(pages_of(SITE["nav"])) == sorted([*pages, "index.md", "CHANGELOG.md"])


def test_readme_leads_to_every_part_of_the_site():
    for (title, below), *_ in map(dict.items, SITE["nav"][1:]):
        linked = [page for page in pages_of(below) if re.search(rf"\((docs/)?{page}\)", README)]
        assert linked, title


def test_every_page_begins_with_what_it_answers():
    for page in PAGES:
        title, paragraph = page.read_text().split("\n\n")[:2]
        assert re.fullmatch("# .+", title), page.name
        assert re.match(r"[\w`*]", paragraph), page.name


def test_the_picture_is_the_one_that_its_script_draws():
    script = runpy.run_path(str(DOCS / "picture.py"))
    drawn = script["picture"](script["ROWS"])
    assert (DOCS / "how-it-works.svg").read_text() == drawn
    ElementTree.fromstring(drawn)


def figures_of(table):
    """Numbers with a decimal point, and cells that are a number, as they are written."""
    for cell in re.sub(r"\]\(\S*\)", "", table).replace("**", "").split("|"):
        yield from re.findall(r"\d+\.\d+", cell) or re.findall(r"^ *(\d+) *$", cell)


@pytest.mark.parametrize(("page", "at_least"), [("benchmarks.md", 100), ("batches.md", 20)])
def test_figures_are_those_of_the_results(page, at_least):
    """In the tables of a section that links to results, each is in one of them, rounded."""
    seen = 0
    for section in re.split("^## ", (DOCS / page).read_text(), flags=re.M):
        results = re.findall(r"\(\.\./(benchmarks/results/\S+)\.md\)", section)
        cells = chain.from_iterable(chain.from_iterable(map(read_csv, results)))
        measured = [float(x) for x in cells if re.fullmatch(r"[\d.e+-]*\d", x)]
        table = "\n".join(re.findall(r"^\|.*\|$", section, flags=re.M)) if results else ""
        for figure in figures_of(table):
            digits = len(figure.partition(".")[2])
            assert any(f"{x:.{digits}f}" == figure for x in measured), (section[:30], figure)
            seen += 1
    assert seen >= at_least


def test_figures_of_the_readme_are_those_of_the_pages():
    (section,) = re.findall(r"^## What it gains.*?(?=^## )", README, flags=re.M | re.S)
    texts = section, (DOCS / "benchmarks.md").read_text(), (DOCS / "batches.md").read_text()
    readme, *pages = ("\n".join(re.findall(r"^\|.*\|$", x, flags=re.M)) for x in texts)
    figures = set(figures_of(readme))
    assert len(figures) > 25
    assert figures - set(chain.from_iterable(map(figures_of, pages))) == set()


def read_csv(result):
    return list(csv.reader((ROOT / f"{result}.csv").read_text().splitlines()))


HOW = (ROOT / "docs" / "how-it-works.md").read_text()


def test_every_file_has_its_row():
    rows = re.findall(r"^\| (`.*?) \|", HOW[HOW.index("## Where the code lives") :], flags=re.M)
    named = re.findall(r"`(.*?)`", " ".join(rows))
    here = {x.name for x in PACKAGE.iterdir() if x.suffix in (".py", ".pth")}
    folders = [x for x in PACKAGE.iterdir() if (x / "__init__.py").exists()]
    assert sorted(named) == sorted(here | {f"{folder.name}/" for folder in folders})
    for file in chain.from_iterable(folder.glob("[a-z]*.py") for folder in folders):
        assert f"`{file.name}`" in HOW


def imports_of(file):
    """Files of the package that a file imports as it is run: not for types, not in functions."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_prefix_patch."):
            yield node.module.split(".")[1]


def test_imports_run_one_way():
    order = re.findall(r"`(\w+)`", HOW[HOW.index("Imports run one way") : HOW.index("Two imports")])
    here = {x.stem for x in PACKAGE.glob("*.py")} - {"__init__"}
    assert sorted(order) == sorted(here | {"backends", "commands"})
    seen = 0
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imports_of(file):
            assert name == other or order.index(other) < order.index(name), (name, other)
            seen += 1
    assert seen > 50


def test_before_and_after_stand_at_the_top():
    assert "enable_prefix_sharing" in "\n".join(README.splitlines()[:15])


def test_public_names():
    assert sorted(hf_prefix_patch.__all__) == hf_prefix_patch.__all__
    for name in hf_prefix_patch.__all__:
        assert getattr(hf_prefix_patch, name).__doc__
        assert name in hf_prefix_patch.__doc__
        assert name in dir(hf_prefix_patch)


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
    """Nor does it load the trainer module, whose import takes as long as all of the rest, and
    beside what a program with a model has loaded it takes less than 2 s (of this process alone,
    however busy the machine is)."""
    extras = ["accelerate", "datasets", "gguf", "matplotlib", "peft", "trl"]
    code = (
        "import sys, time\n"
        f"for name in {extras}: sys.modules[name] = None\n"
        "from transformers import PreTrainedModel\n"
        "start = time.process_time()\n"
        "from hf_prefix_patch import *\n"
        "seconds = time.process_time() - start\n"
        "assert 'hf_prefix_patch.patch' in sys.modules\n"
        "assert 'transformers.trainer' not in sys.modules\n"
        "assert seconds < 2, seconds"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
