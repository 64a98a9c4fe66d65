"""What is too old is refused by name, and versions are compared in one file."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_trl import build_trainer, load, lora_config, save_tiny_model

import hf_prefix_patch
from hf_prefix_patch import enable_prefix_sharing, versions
from hf_prefix_patch.hooks import patch_of

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hf_prefix_patch.__file__).parent


@pytest.mark.parametrize(
    ("version", "release"),
    [("4.53.3", (4, 53)), ("2.13.0+cpu", (2, 13)), ("5.24.0.dev0", (5, 24)), ("6", (6, 0))],
)
def test_releases(version, release):
    assert versions.release(version) == release


@pytest.mark.parametrize("package", versions.FLOORS)
def test_a_release_below_the_floor_is_refused(package):
    major, minor = versions.FLOORS[package]
    floor = f"{major}.{minor}"
    versions.check_version(package, f"{floor}.0")
    versions.check_version(package, f"{major + 1}.0.0")
    old = f"{major}.{minor - 1}.7"
    message = (
        f"needs {package} {floor} or later, but {package} {old} is installed; "
        f"pip install -U '{package}>={floor}'"
    )
    with pytest.raises(ImportError, match=re.escape(message)):
        versions.check_version(package, old)


@pytest.mark.parametrize(
    ("package", "version"), [("torch", "2.8.0+cu128"), ("transformers", "4.49.0")]
)
def test_importing_says_what_is_too_old(package, version):
    """Before anything that an old release lacks is missed: these have nothing but a version."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    code = "import sys, types\n" + "".join(
        f"sys.modules[{name!r}] = types.ModuleType({name!r})\n"
        f"sys.modules[{name!r}].__version__ = {str(given)!r}\n"
        for name, given in (found | {package: version}).items()
    )
    program = [sys.executable, "-c", code + "from hf_prefix_patch import PrefixTree"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: hf_prefix_patch needs {package} ")


def test_an_old_trl_is_refused(tmp_path, monkeypatch):
    trainer = build_trainer(load(save_tiny_model(tmp_path)), tmp_path)
    monkeypatch.setattr("trl.__version__", "0.17.0")
    with pytest.raises(ImportError, match=r"needs trl 0\.18 or later, but trl 0\.17\.0 is"):
        enable_prefix_sharing(trainer)
    assert patch_of(trainer.model.base_model) is None


def test_an_old_peft_is_refused(tmp_path, monkeypatch):
    from peft import get_peft_model

    model = get_peft_model(load(save_tiny_model(tmp_path)), lora_config())
    monkeypatch.setattr("peft.__version__", "0.14.0")
    with pytest.raises(ImportError, match=r"needs peft 0\.15 or later, but peft 0\.14\.0 is"):
        enable_prefix_sharing(model)


def test_what_is_not_loaded_is_not_looked_at(monkeypatch):
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    versions.check_loaded("trl")


@pytest.mark.parametrize(
    ("release", "resolved", "mark"),
    [
        ("4.53.3", False, "_pre_quantization_dtype"),
        ("4.57.6", True, "_pre_quantization_dtype"),
        ("5.23.0", True, "_is_quantized"),
    ],
)
def test_what_differs(monkeypatch, release, resolved, mark):
    monkeypatch.setattr("transformers.__version__", release)
    found = SimpleNamespace(**runpy.run_path(versions.__file__))
    assert resolved == found.FLASH_IS_RESOLVED
    assert found.QUANTIZED[0] == mark


def test_versions_are_compared_in_one_file():
    for path in PACKAGE.rglob("*.py"):
        compares = re.search(
            r"__version__\s*[<>=!]=|\b(Version|version|release)\(", path.read_text()
        )
        assert path.name == "versions.py" or not compares, path


def test_floors_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["trl"]
    floors = dict(line.split(">=") for line in asked)
    for package, (major, minor) in versions.FLOORS.items():
        assert floors[package] == f"{major}.{minor}", package


def pins(path):
    return dict(line.split("==") for line in path.read_text().split())


def test_the_oldest_of_each_package_is_pinned_somewhere():
    """The floors of pyproject.toml are what `make test-versions` installs.

    But for torch: of its older releases, pip has CUDA builds of gigabytes alone.
    """
    files = [ROOT / "constraints.txt", *(ROOT / "constraints").glob("*.txt")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["trl"]
    for package, floor in (line.split(">=") for line in asked):
        if package == "torch":
            continue
        oldest = min(versions.release(pins(path)[package]) for path in files)
        assert oldest == versions.release(floor), package


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda p: p.stem)
def test_constraints_pin_everything(path):
    lines = path.read_text().splitlines()
    assert lines == sorted(lines, key=str.lower)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    package, version = path.stem.split("-", 1)
    assert pins(path)[package].startswith(f"{version}.")
    assert path.name in (ROOT / "docs" / "versions.md").read_text()
    assert path.stem in (ROOT / "Makefile").read_text()
