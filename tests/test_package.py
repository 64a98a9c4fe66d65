"""What is built and published: the wheel, the archive of sources, their metadata, the citation.

The two are built here without network; `make package` gives those that it has built in the folder
PACKAGE_DIST, and then runs installed.py where the wheel is installed.
"""

import ast
import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_prefix_patch

ROOT = Path(__file__).parents[1]
VERSION = hf_prefix_patch.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "hf_prefix_patch").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
)


def build(target, source, folder):
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The archive of sources, and the wheel built from what is in that archive."""
    given = os.environ.get("PACKAGE_DIST")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("dist")
    build("sdist", ROOT, folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    build("wheel", next((folder / "unpacked").iterdir()), folder)
    return folder


@pytest.fixture
def wheel(dist):
    with zipfile.ZipFile(dist / f"hf_prefix_patch-{VERSION}-py3-none-any.whl") as file:
        yield file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"hf_prefix_patch-{VERSION}.dist-info/"
    about = ["METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"]
    modules = [name for name in SOURCES if not name.endswith(".pth")]
    wanted = [*modules, "hf_prefix_patch.pth", *(info + name for name in about)]
    assert sorted(wheel.namelist()) == sorted(wanted)
    assert "hf_prefix_patch/py.typed" in modules
    for name in modules:
        assert wheel.read(name) == (ROOT / name).read_bytes(), name
    start = (ROOT / "hf_prefix_patch" / "switch.pth").read_bytes()
    assert wheel.read("hf_prefix_patch.pth") == start
    assert wheel.read(info + "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert b"hf-prefix-patch = hf_prefix_patch.cli:main" in wheel.read(info + "entry_points.txt")


def test_archive_of_sources_can_be_tested(dist):
    """It has all that `make test` and `make demo` read, and nothing that was made on the way."""
    with tarfile.open(dist / f"hf_prefix_patch-{VERSION}.tar.gz") as archive:
        top = f"hf_prefix_patch-{VERSION}/"
        held = {name.removeprefix(top) for name in archive.getnames()}
    asked = ["Makefile", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"]
    asked += ["CHANGELOG.md", "CITATION.cff", "PKG-INFO", *SOURCES]
    for folder in ("tests", "examples", "benchmarks", "docs", "constraints"):
        here = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        names = [path.relative_to(ROOT).as_posix() for path in here]
        asked += [name for name in names if "__pycache__" not in name]
    assert set(asked) <= held, set(asked) - held
    made = [name for name in held if re.search(r"pycache|\.pyc$|^\.(venv|ci)|^(build|dist)/", name)]
    assert not made


@pytest.fixture
def metadata(wheel):
    return wheel.read(f"hf_prefix_patch-{VERSION}.dist-info/METADATA")


def test_metadata(metadata):
    known = Metadata.from_email(metadata, validate=True)
    assert (known.name, str(known.version)) == ("hf_prefix_patch", VERSION)
    assert known.description_content_type.startswith("text/markdown")
    assert known.license_expression == "Apache-2.0"
    assert known.license_files == ["LICENSE"]
    assert not known.project_urls  # there is no address yet
    assert str(known.requires_python) == ">=3.11"
    needed = {r.name for r in map(Requirement, map(str, known.requires_dist)) if not r.marker}
    assert needed == {"torch", "transformers", "numpy", "tqdm"}
    assert set(known.provides_extra) == PROJECT["optional-dependencies"].keys()


def test_package_page_has_no_dead_links(metadata):
    page = email.message_from_bytes(metadata).get_payload()
    assert page.startswith("# hf_prefix_patch\n")
    assert "```sh\npip install hf_prefix_patch " in page
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links, "none at all: the paper's is missing"
    for link in links:
        assert link.startswith("https://"), link
    readme = (ROOT / "README.md").read_text()
    code = re.findall(r"```.*?```", page, flags=re.S)
    assert code == re.findall(r"```.*?```", readme, flags=re.S)
    assert "docs/limits.md has the whole list" in page  # what a link said is still there


def test_extras_of_the_install_section_exist():
    readme = (ROOT / "README.md").read_text()
    for extras in re.findall(r"hf_prefix_patch\[([\w,]+)\]", readme):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_scripts_import_what_their_extras_bring(folder):
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["demo"], *extras["trl"]]
    known = {Requirement(line).name for line in asked} | set(sys.stdlib_module_names)
    known |= {"tokenizers", "psutil"}  # transformers and accelerate need them
    known |= {
        path.stem for name in ("examples", "benchmarks") for path in ROOT.glob(f"{name}/*.py")
    }
    used = set()
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add(node.module.split(".")[0])
    assert {"torch", "trl"} <= used
    assert used <= known, used - known


def test_constraints_pin_what_the_extras_name():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines == sorted(lines, key=str.lower)
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines}
    asked = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    names = {canonicalize_name(Requirement(line).name) for line in asked}
    assert names - {"hf-prefix-patch"} <= pinned


def test_citation():
    """The fields that version 1.2.0 of the format asks for, and what they have to agree with."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert cited["type"] == "software"
    assert cited["title"] == PROJECT["name"]
    assert cited["version"] == VERSION
    assert cited["license"] == PROJECT["license"]
    assert cited["authors"] == PROJECT["authors"]
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert [author["family-names"] for author in paper["authors"]] == ["Wang", "Hegde"]
    readme = (ROOT / "README.md").read_text()
    assert paper["url"] in readme
    assert paper["title"] in re.sub(r"\s+", " ", readme)
