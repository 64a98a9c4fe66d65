"""Every bad input of `bad_input_cases/` gets its message, and each message has a test."""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import FOLDER, GROUPS, PACKAGE, Outcome, read_cases, run

from hf_prefix_patch import bypass
from hf_prefix_patch.bypass import ADVICE
from hf_prefix_patch.plans import NOTHING_TO_GAIN

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
CASES = {f"{group}: {x.title}": x for group in GROUPS for x in read_cases(group)[1]}


@cache
def outcome(title: str) -> Outcome:
    return run(CASES[title])


@pytest.mark.parametrize("title", CASES)
def test_bad_input(title: str) -> None:
    """The kind of error that it should be, with what was given, what is needed and what to do."""
    case, got = CASES[title], outcome(title)
    assert got.kind is not None
    assert issubclass(got.kind, case.kind), (got.kind, got.message)
    assert got.lines, "the message is not of the package"
    missing = [part for part in case.parts if part not in got.message or not part]
    assert not missing, got.message


def test_the_page_has_what_the_cases_led_to() -> None:
    spec = importlib.util.spec_from_file_location("messages", DOCS / "messages.py")
    assert spec is not None
    assert spec.loader is not None
    messages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(messages)
    want = messages.page({title: outcome(title).message for title in CASES})
    assert (DOCS / "messages.md").read_text() == want, "run python docs/messages.py"


# Completeness.


@dataclass(frozen=True)
class Site:
    """A statement that tells the user something: lines `first` to `last` of a file."""

    file: str
    first: int
    last: int
    text: str

    def reached(self, lines: set[tuple[str, int]]) -> bool:
        return any(self.file == file and self.first <= n <= self.last for file, n in lines)


@cache
def sites() -> list[Site]:
    """What the package raises or warns of, the protocol of attributes and bare `raise` aside."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source, file = path.read_text(), str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise | ast.Expr) and _tells(node):
                text = re.sub(r'"\s+f?"', "", ast.get_source_segment(source, node) or "")
                found.append(Site(file, node.lineno, node.end_lineno or node.lineno, text))
    return found


def _tells(node: ast.Raise | ast.Expr) -> bool:
    call = node.exc if isinstance(node, ast.Raise) else node.value
    if not isinstance(call, ast.Call):
        return False
    name = ast.unparse(call.func)
    if isinstance(node, ast.Raise):
        return name != "AttributeError"
    return name.endswith(("warnings.warn", "warn_caller", "parser.error"))


def elsewhere() -> list[tuple[str, str, str]]:
    """What other tests reach: a file and words of the statement, or "reason" and a reason."""
    lines = (FOLDER / "elsewhere.txt").read_text().splitlines()
    entries = [line.split(" | ") for line in lines if line and not line.startswith("#")]
    return [(file, words, test) for file, words, test in entries]


def test_every_message_is_reached() -> None:
    """A new `raise` or warning wants a case, or a test that `elsewhere.txt` names."""
    lines = set().union(*(outcome(title).lines for title in CASES))
    named = [entry for entry in elsewhere() if entry[0] != "reason"]
    untold = [
        f"{site.file}, line {site.first}: {site.text}"
        for site in sites()
        if not site.reached(lines)
        and not any(site.file == file and words in site.text for file, words, _ in named)
    ]
    assert not untold, "\n".join(untold)


def test_every_reason_is_reached() -> None:
    """The same for reasons to bypass a call, each of which has its advice."""
    assert reasons() - {NOTHING_TO_GAIN} == set(ADVICE)
    bypassed = [
        re.search(r"is bypassed: (.*?)\. To share", outcome(title).message) for title in CASES
    ]
    told = {_general(match[1]) for match in bypassed if match}
    told |= {words for file, words, _ in elsewhere() if file == "reason"}
    assert told == set(ADVICE)


def reasons() -> set[str]:
    """All that the package gives: returned, or in a plan without a tree."""
    found = []
    functions = {"adapter_reason", "bypass_reason", "outdated", "unreadable"}
    functions |= {"_misfit", "_reason_of_several"}
    for name in ("adapters", "bypass", "composite", "config_views", "documents", "hooks", "plans"):
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if name != "composite" and isinstance(node, ast.FunctionDef):
                if node.name in functions:
                    found += [x.value for x in ast.walk(node) if isinstance(x, ast.Return)]
            elif name == "composite" and isinstance(node, ast.Return):
                if isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
                    found.append(node.value.elts[1])
            elif isinstance(node, ast.Call) and re.match(r"(cls|Plan)\(None, ", ast.unparse(node)):
                found.append(node.args[1])

    texts = [_text(node, vars(bypass)) for node in found]
    return {_general(text) for text in texts if text is not None}


def _text(node: Any, names: dict[str, Any]) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(x.value if isinstance(x, ast.Constant) else "'x'" for x in node.values)
    if isinstance(node, ast.Name) and isinstance(names.get(node.id), str):
        return str(names[node.id])
    return None


def _general(reason: str) -> str:
    return re.sub("'[^']*'", "'...'", reason)


@pytest.mark.parametrize("entry", elsewhere(), ids=lambda entry: f"{entry[0]}: {entry[1]}")
def test_what_is_reached_elsewhere_is_there(entry: tuple[str, str, str]) -> None:
    file, words, test = entry
    module, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (TESTS / module).read_text(), flags=re.M)
    assert file == "reason" or any(s.file == file and words in s.text for s in sites())
