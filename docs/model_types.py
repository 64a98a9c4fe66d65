"""Which causal-LM types of the installed transformers are shared: writes docs/models.md.

python docs/model_types.py                        every type, a few minutes
python docs/model_types.py --types llama,qwen3    these alone, shown and not written
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from sharing_status import (
    BROKEN,
    KINDS,
    LEAST_LEAK,
    NOT_BUILT,
    REFUSED,
    SHARED,
    TOLERANCE,
    VERIFICATION,
    WRONG,
    Status,
    status_of,
)
from tiny_types import MODEL_TYPES

PAGE = Path(__file__).with_name("models.md")
PACKAGES = ("transformers", "torch", "tree-recurrence", "hf_prefix_patch")
_SECONDS = 300

_LEGEND = {
    SHARED: "runs on the packed row, with the errors below",
    REFUSED: "`enable_prefix_sharing` raises and names the feature; the model stays as it was",
    VERIFICATION: "the check at enable time (`verify=True`, the default) finds that it cannot be "
    "shared, and restores the model",
    WRONG: "shared, with results that differ from the unpatched model's",
    BROKEN: "the check itself failed",
    NOT_BUILT: "there is no tiny model to compare",
}


def statuses(types: list[str], jobs: int) -> Iterator[Status]:
    """Of each type, from a process of its own, in order."""
    context = multiprocessing.get_context("forkserver")
    # The server imports what is slow to import once; it takes its path from the environment.
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    context.set_forkserver_preload(["sharing_status"])
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(partial(_isolated, context), types)


def _isolated(context: multiprocessing.context.ForkServerContext, model_type: str) -> Status:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(_SECONDS):
            return ours.recv()
        return Status(model_type, BROKEN, f"took more than {_SECONDS} s")
    except EOFError:
        process.join()
        return Status(model_type, BROKEN, f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _report(model_type: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        status = status_of(model_type)
    except Exception as error:
        status = Status(model_type, BROKEN, f"{type(error).__name__}: {error}")
    connection.send(status)


def page(found: list[Status]) -> str:
    """The page as Markdown; the same for the same statuses."""
    counts = Counter(status.kind for status in found)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        "# Model types",
        "",
        f"Every causal-LM type of transformers, {len(found)} in all, and whether it is shared.",
        "",
        f"Made with {versions}, by `python docs/model_types.py`.",
        "",
        "| status | types | meaning |",
        "|---|--:|---|",
        *(f"| {kind} | {counts[kind]} | {_LEGEND[kind]} |" for kind in KINDS),
        "",
        "Each type was built with random weights from its default config, with small sizes, "
        "without dropout and with a layer of every kind that its default config has. Two "
        "preference pairs, padded on the right and on the left, ran forward and backward in fp32 "
        "on a CPU, with the patch and without. *Log-probs* is the largest error of a row's "
        "completion log-prob, chosen and rejected, relative to one more than its size; "
        "*gradients* is the largest error of a gradient, relative to the largest entry of the "
        f"model's gradients. Both must stay within {TOLERANCE:.0e}. *Leak* is what the log-prob of "
        "the second row of a pair changes by in the same measure when the plan is a wrong one, in "
        f"which rows see each other: a comparison that would show less than {LEAST_LEAK:.0e} is "
        "not counted as shared. *Documents*: what becomes of the rows when they stand one after "
        "another in one row, told apart by their positions: they are shared, held to the same "
        "tolerance, or run as they are, because the unpatched model looks across them or does not "
        "take positions.",
        "",
        "A checkpoint may have other kinds of layers than the default config of its type, and is "
        "then refused or verified by its own config.",
    ]
    for kind in KINDS:
        rows = [status for status in found if status.kind == kind]
        if rows:
            lines += ["", f"## {kind.capitalize()}", "", *_table(kind, rows)]
    return "\n".join(lines) + "\n"


def _table(kind: str, rows: list[Status]) -> Iterator[str]:
    figures = kind in (SHARED, WRONG)
    titles = " log-probs | gradients | leak | documents |" if figures else ""
    yield f"| type | class |{titles} notes |"
    yield "|---|---|" + ("--:|--:|--:|---|" if figures else "") + "---|"
    for row in sorted(rows, key=lambda row: row.model_type):
        numbers = f" {row.logps:.0e} | {row.gradients:.0e} | {row.leak:.0e} | {row.documents} |"
        cells = f"| {row.model_type} | {MODEL_TYPES[row.model_type]} |{numbers if figures else ''}"
        yield f"{cells} {_note(row)} |".replace("|  |", "| |")


def _note(status: Status) -> str:
    """The reason of a refusal without its frame and the advice that follows it."""
    text = re.sub(r"^\w+: ", "", status.detail).split("; ")[0].replace("|", "\\|")
    text = re.sub(r"^prefix sharing refused: \w+ ", "", text)
    text = text.replace("verification of prefix sharing failed: ", "")
    text = text.split(" You can install")[0]
    return f"{text}. {status.outcome}" if status.outcome else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="comma-separated; the page is then left alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    options = parser.parse_args()
    types = options.types.split(",") if options.types else list(MODEL_TYPES)
    unknown = sorted(set(types) - set(MODEL_TYPES))
    if unknown:
        parser.error(f"{unknown} are no causal-LM types of transformers {version('transformers')}")
    found = []
    for status in statuses(types, options.jobs):
        found.append(status)
        print(f"{len(found)}/{len(types)} {status.model_type}: {status.kind}. {_note(status)}")
    if not options.types:
        PAGE.write_text(page(found))
    if any(status.kind in (WRONG, BROKEN) for status in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
