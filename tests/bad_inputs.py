"""Bad inputs and the messages that they get.

`bad_input_cases/` has them: a title, code that is run as it stands, and what that leads to, with
three parts that the message must have: what was given, what is needed, what to do. docs/messages.md
shows them all.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bad_input_names import NAMES

import hf_prefix_patch
from hf_prefix_patch.notices import warn_caller

PACKAGE = Path(hf_prefix_patch.__file__).parent
FOLDER = Path(__file__).parent / "bad_input_cases"
GROUPS = (
    *("models", "bypassed", "batches", "packed_rows", "data", "options"),
    *("launcher", "commands"),
)
"""Files of the folder, in the order of the page."""

_LAST_LINE = re.compile(r"^(\w+(?:Error|Warning|Exit)): (.*) \| (.*) \| (.*)$", flags=re.M)


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        code: what the user does; names that it does not define are those of `NAMES`.
        kind: of the exception or warning.
        parts: of the message: what was given, what is needed, what to do.
    """

    title: str
    code: str
    kind: type[BaseException]
    parts: tuple[str, ...]


def read_cases(group: str) -> tuple[str, list[Case]]:
    """Heading and cases of a file of the folder."""
    heading, *texts = (FOLDER / f"{group}.txt").read_text().split("\n## ")
    return heading.removeprefix("# ").strip(), [_case(text) for text in texts]


def _case(text: str) -> Case:
    title, _, body = text.partition("\n")
    end = _LAST_LINE.search(body)
    assert end is not None, title
    kind, *parts = end.groups()
    return Case(title, body[: end.start()].strip(), getattr(builtins, kind), tuple(parts))


@dataclass
class Outcome:
    """What a case led to.

    Attributes:
        kind: of what was raised or warned of; None if nothing was.
        message: without what differs from run to run.
        lines: where in the package it came from, file and line.
    """

    kind: type[BaseException] | None = None
    message: str = ""
    lines: set[tuple[str, int]] = field(default_factory=set)


def run(case: Case) -> Outcome:
    """Run a case in a folder of its own."""
    outcome, printed, home = Outcome(), io.StringIO(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        os.chdir(folder)
        try:
            with _noted_warnings(outcome), contextlib.redirect_stderr(printed):
                exec(compile(case.code, "<case>", "exec"), _namespace(case.code))
        except SystemExit as error:
            said = printed.getvalue() if isinstance(error.code, int) else f"{error.code}\n"
            _note_error(outcome, error, said.splitlines()[-1])
        except Exception as error:
            if not issubclass(case.kind, Warning):  # what was warned of came true
                _note_error(outcome, error, str(error))
        finally:
            os.chdir(home)
    # Addresses, and digits that are rounding.
    outcome.message = re.sub("0x[0-9a-f]{4,}", "0x...", outcome.message)
    outcome.message = re.sub(r"(\d)\.\d+e", r"\1e", outcome.message)
    return outcome


def _note_error(outcome: Outcome, error: BaseException, message: str) -> None:
    outcome.kind, outcome.message = type(error), message
    causes: list[BaseException | None] = [error]
    for cause in causes:
        if cause is None:
            continue
        causes += [x for x in (cause.__cause__, cause.__context__) if x not in causes]
        for frame in traceback.extract_tb(cause.__traceback__):
            _note_line(outcome, frame.filename, frame.lineno)


def _note_line(outcome: Outcome, file: str, line: int | None) -> None:
    if Path(file).is_relative_to(PACKAGE):
        outcome.lines.add((str(Path(file).relative_to(PACKAGE)), line or 0))


@contextlib.contextmanager
def _noted_warnings(outcome: Outcome) -> Iterator[None]:
    """Those of the package are noted, others go on as they are."""
    original = warnings.warn

    def warn(message: Any, category: Any = UserWarning, *args: Any, **kwargs: Any) -> None:
        caller = sys._getframe(1)
        if not Path(caller.f_code.co_filename).is_relative_to(PACKAGE):
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            original(message, category, *args, **kwargs)
        elif outcome.kind is None:
            _note_line(outcome, caller.f_code.co_filename, caller.f_lineno)
            if caller.f_code is warn_caller.__code__ and caller.f_back is not None:
                _note_line(outcome, caller.f_back.f_code.co_filename, caller.f_back.f_lineno)
            outcome.kind, outcome.message = category or UserWarning, str(message)

    warnings.warn = warn  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.warn = original


def _namespace(code: str) -> dict[str, Any]:
    used = set(re.findall(r"\w+", code))
    return {name: build() for name, build in NAMES.items() if name in used}
