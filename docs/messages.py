"""Write docs/messages.md: what bad inputs lead to.

The cases are those of tests/bad_input_cases, and each is run.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bad_inputs import GROUPS, read_cases, run  # noqa: E402 - needs the path above

PAGE = ROOT / "docs" / "messages.md"

_HEAD = """\
# Messages

What the library says when it cannot do what it is asked, or does it without sharing. Each message
says what was given, what is needed and what to do. `python docs/messages.py` runs these inputs and
writes this page; a test runs them too, and compares.

In the code, `model` is a Llama with a vocabulary of 50 tokens, in training mode; `rows` are the
`ids` and the `mask` of a batch, four rows of 15 columns; `pairs` are two tokenised examples, and
`packed` is the batch of both that `DataCollatorWithPrefixSharing(layout="packed")` makes.
"""


def page(messages: dict[str, str]) -> str:
    """The text of the page from the message of each case, by its group and title."""
    parts = [_HEAD]
    for group in GROUPS:
        heading, cases = read_cases(group)
        parts.append(f"## {heading}\n")
        for case in cases:
            code = "".join(f"    {line}\n" for line in case.code.splitlines())
            message = messages[f"{group}: {case.title}"].replace("<", "&lt;").replace("*", "\\*")
            parts.append(f"### {case.title}\n\n{code}\n> **{case.kind.__name__}**: {message}\n")
    return "\n".join(parts)


def main() -> None:
    cases = {f"{group}: {x.title}": x for group in GROUPS for x in read_cases(group)[1]}
    PAGE.write_text(page({title: run(case).message for title, case in cases.items()}))


if __name__ == "__main__":
    main()
