"""What cannot be run as a program; what can is in test_launcher.py, in processes of its own."""

import sys

import pytest

from hf_prefix_patch.program import run_file, run_module


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*/absent\.py'"):
        run_file(str(tmp_path / "absent.py"), [])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that Python is started in, and a package there that needs another."""
    (tmp_path / "needy").mkdir()
    (tmp_path / "needy" / "__init__.py").write_text("import absent_dependency")
    (tmp_path / "needy" / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))


@pytest.mark.usefixtures("package")
def test_what_a_package_misses_is_not_taken_for_the_module():
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent_dependency'"):
        run_module("needy.train", [])
    with pytest.raises(SystemExit, match=r"no module 'needless\.train' that can be run"):
        run_module("needless.train", [])
