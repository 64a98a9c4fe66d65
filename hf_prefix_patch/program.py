"""Run a file or a module as `python` runs it, in this process."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType


def run_file(path: str, args: list[str]) -> None:
    """As `python path args...`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path!r}, but one is needed to run; check the path")
    absolute = os.path.join(os.getcwd(), path)  # as Python writes it, "./" and all
    with io.open_code(absolute) as file:
        code = compile(file.read(), absolute, "exec", dont_inherit=True)
    main = ModuleType("__main__")
    main.__loader__ = SourceFileLoader("__main__", absolute)
    vars(main).update(__file__=absolute, __cached__=None, __annotations__={})
    _set_path(os.path.dirname(os.path.realpath(path)))
    sys.argv[:] = [path, *args]
    _run(code, main)


def run_module(name: str, args: list[str]) -> None:
    """As `python -m name args...`.

    Raises:
        SystemExit: there is no such module, or it is a package that cannot be run.
    """
    _set_path(os.getcwd())
    sys.argv[:] = ["-m", *args]
    spec, code = _find(name)
    main = ModuleType("__main__")
    main.__loader__, main.__spec__, main.__package__ = spec.loader, spec, spec.parent
    vars(main).update(__file__=spec.origin, __cached__=spec.cached, __annotations__={})
    sys.argv[0] = spec.origin or name
    _run(code, main)


def _find(name: str) -> tuple[ModuleSpec, CodeType]:
    try:
        spec = None if name.startswith(".") else importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # something that a parent package imports
        spec = None
    code = getattr(spec.loader, "get_code", lambda _: None)(name) if spec else None
    if spec is None or code is None:
        raise SystemExit(
            f"hf-prefix-patch: no module {name!r} that can be run, but -m needs one; give "
            "its name with dots and without .py"
        )
    return spec, code


def _set_path(directory: str) -> None:
    """Put the program's directory where the interpreter has put that of this one."""
    if not sys.flags.safe_path:
        sys.path[0] = directory


def _run(code: CodeType, main: ModuleType) -> None:
    """Stays `__main__` for good: threads and exit handlers may pickle what it defines."""
    sys.modules["__main__"] = main
    vars(main)["__builtins__"] = builtins  # the module; `exec` would put its dict there
    exec(code, vars(main))
