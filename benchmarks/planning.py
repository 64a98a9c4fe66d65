"""What a data loader does on one thread: plan rows, collate batches, batch a data set.

    python benchmarks/planning.py [--data PATH ...] [--out benchmarks/results]

Planning alone: rows that share three quarters in pairs, all rows one prompt, or nothing.

What a worker does for a batch: the plan alone, and collating with it in either layout. Synthetic
batches from few long rows to many short ones, and with `--data` the batches of real sets, 8 pairs
in random order. The target is 5 million row tokens a second: far more than a trainer takes.

Batching: 100,000 pairs, four to a prompt, by `PrefixSharingBatchSampler`. The target is half a
minute for its construction and an epoch together.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import medians
from pairs import Pair, load_tokenizer, synthetic_pairs
from report import machine, results_folder, write_table
from token_ratios import random_batches

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharingBatchSampler,
    PrefixTree,
    tokenize_preferences,
)
from hf_prefix_patch.measuring import seconds_of
from hf_prefix_patch.plans import Plan
from hf_prefix_patch.rows import HostRows

CPU = torch.device("cpu")
VOCAB = 50_000
LAYOUTS = ("rows", "packed")
TARGET_RATE = 5.0
TARGET_SECONDS = 30.0
Batch = Sequence[dict[str, Any]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=16, help="of planning alone")
    add("--length", type=int, default=4096, help="of planning alone")
    add("--repeats", type=int, default=30)
    add("--data", type=Path, nargs="+", default=[], help="JSONL: prompt, chosen, rejected")
    add("--tokenizer", help="folder of a tokenizer; that of SmolLM2 if not given")
    add("--pairs", type=int, default=8, help="in a batch of real pairs")
    add("--pairs-in-set", type=int, default=100_000, help="that the sampler batches")
    add("--out", type=results_folder, help="folder for the tables")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    planning(args)
    collating(args)
    batching(args)


def planning(args: argparse.Namespace) -> None:
    """The table of `PrefixTree.from_rows` alone."""
    table = []
    for kind in ("pairs", "one prompt", "nothing shared"):
        ids = rows_of(kind, args.rows, args.length)
        mask = torch.ones_like(ids)
        times = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            tree = PrefixTree.from_rows(ids, mask)
            times.append(time.perf_counter() - start)
        median = statistics.median(times)
        rate = ids.numel() / median / 1e6
        table.append((kind, tree.packed_tokens, 1e3 * median, 1e3 * max(times), rate))
    header = ("rows", "packed tokens", "median ms", "worst ms", "million row tokens per s")
    title = f"Planning {args.rows} rows of {args.length} tokens"
    write_table(title, header, table, args.out, f"{machine('cpu')}, 1 thread")


def rows_of(kind: str, rows: int, length: int) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    shared = 3 * length // 4
    if kind == "pairs":
        ids[rows // 2 :, :shared] = ids[: rows // 2, :shared]
    elif kind == "one prompt":
        ids[:, :shared] = ids[0, :shared]
    return ids


def collating(args: argparse.Namespace) -> None:
    """The table of `DataCollatorWithPrefixSharing`: means over the batches of a set."""
    collators = {x: DataCollatorWithPrefixSharing(pad_token_id=0, layout=x) for x in LAYOUTS}
    table = []
    for name, batches in chain(synthetic_batches(), real_batches(args)):
        collated = [collators["rows"](batch) for batch in batches]
        trees = [batch["input_ids"].prefix_tree for batch in collated]
        sizes = [(t.num_rows, len(t.parents), t.row_tokens, t.packed_tokens) for t in trees]
        means = [statistics.mean(column) for column in zip(*sizes, strict=True)]
        rows = [(x["input_ids"].numpy(), x["attention_mask"].numpy() != 0) for x in collated]
        work = {"plan": partial(plan, rows)}
        work |= {layout: partial(collate, x, batches) for layout, x in collators.items()}
        timers = {what: partial(seconds_of, do, CPU) for what, do in work.items()}
        seconds = [x / len(batches) for x in medians(timers, args.repeats).values()]
        rates = (means[2] / x / 1e6 for x in seconds)
        table.append((name, *means, *(1e3 * x for x in seconds), *rates, TARGET_RATE))
    header = ("batch", "rows", "segments", "row tokens", "packed tokens")
    kinds = ("plan alone", *(f"collate and plan, {layout}" for layout in LAYOUTS))
    header += tuple(f"{kind}: ms" for kind in kinds)
    header += tuple(f"{kind}: million row tokens per s" for kind in kinds)
    note = f"{machine('cpu')}, 1 thread, median of {args.repeats}, means of a batch"
    write_table("Collating and planning batches", (*header, "target"), table, args.out, note)


def plan(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    for ids, real in rows:
        Plan.of_host_rows(HostRows(ids, real))


def collate(collator: DataCollatorWithPrefixSharing, batches: Sequence[Batch]) -> None:
    for batch in batches:
        collator(batch)


def synthetic_batches() -> Iterator[tuple[str, list[Batch]]]:
    """Shapes of batches, one batch each."""
    shapes = {
        "16 rows of 4096": synthetic_pairs(8, 4096, 3.0, 0.0, VOCAB),
        "16 rows of about 300": synthetic_pairs(8, 300, 2.0, 0.5, VOCAB),
        "64 rows of about 150": synthetic_pairs(32, 150, 2.0, 0.5, VOCAB),
        "64 rows of many branches": branching(synthetic_pairs(32, 512, 3.0, 0.0, VOCAB)),
        "256 rows of about 60": synthetic_pairs(128, 60, 2.0, 0.5, VOCAB),
    }
    for name, pairs in shapes.items():
        yield name, [list(map(example, pairs))]


def branching(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with prompts that each part from another one, anywhere."""
    generator = random.Random(0)
    grown: list[Pair] = []
    for pair in pairs:
        trunk = generator.choice(grown).prompt if grown else []
        fork = generator.randrange(len(trunk) + 1)
        grown.append(Pair(trunk[:fork] + pair.prompt[fork:], pair.chosen, pair.rejected))
    return grown


def real_batches(args: argparse.Namespace) -> Iterator[tuple[str, list[Batch]]]:
    """An epoch of each set in random order."""
    if not args.data:
        return
    tokenizer = load_tokenizer(args.tokenizer)
    for path in args.data:
        examples = tokenize_preferences(path, tokenizer)
        batches = random_batches(range(len(examples)), args.pairs, epochs=1)
        yield path.stem, [[examples[i] for i in batch] for batch in batches]


def batching(args: argparse.Namespace) -> None:
    """The table of `PrefixSharingBatchSampler`."""
    pairs = synthetic_pairs(args.pairs_in_set, 300, 2.0, 0.5, VOCAB)
    examples = [
        example(Pair(pairs[i - i % 4].prompt, pair.chosen, pair.rejected))
        for i, pair in enumerate(pairs)
    ]
    tokens = sum(
        2 * len(x["prompt_ids"]) + len(x["chosen_ids"] + x["rejected_ids"]) for x in examples
    )
    table = []
    for name, limit in (("max_tokens", 4096), ("max_pairs", 8)):
        start = time.perf_counter()
        sampler = PrefixSharingBatchSampler(examples, **{name: limit})
        built = time.perf_counter()
        batches = list(sampler)
        seconds = (built - start, time.perf_counter() - built)
        table.append((f"{name}={limit}", len(batches), *seconds, sum(seconds), TARGET_SECONDS))
    header = ("limit", "batches", "construction s", "epoch s", "both s", "target s")
    note = f"{machine('cpu')}, 1 thread, 4 pairs to a prompt, "
    note += f"{tokens / 2 / len(examples):.0f} tokens a row"
    write_table(f"Batching {len(examples)} pairs", header, table, args.out, note)


def example(pair: Pair) -> dict[str, list[int]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return dict(zip(names, (pair.prompt, pair.chosen, pair.rejected), strict=True))


if __name__ == "__main__":
    main()
