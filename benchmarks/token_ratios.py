"""Tokens that batches of real preference pairs leave to compute: at random, or by what they share.

    python benchmarks/token_ratios.py --data PATH ... [--max-tokens 4096 32768] [--out FOLDER]

Each set is batched four ways, averaged over epochs: so many pairs in random order, as a trainer
takes them; as many at most by `PrefixSharingBatchSampler`; random order filled up to a budget of
unique tokens; and that budget given to the sampler. Cells are those of right-padded rows, as TRL
makes them. All is counted in the batches of `DataCollatorWithPrefixSharing`.

The ideal is the whole set in one batch: row tokens that then share one unique token. The ideal
share of a budget is what the fewest batches that could hold these unique tokens would fill. Pairs
larger than a budget are left out of its lines; "-" stands where that leaves none.
"""

import argparse
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from math import ceil, nan
from pathlib import Path
from typing import Any

from charts import grouped_bars
from pairs import load_tokenizer
from report import machine, results_folder, write_table
from tqdm import tqdm

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharingBatchSampler,
    tokenize_preferences,
)

Examples = Sequence[dict[str, Any]]
HEADER = ("set", "pairs", "batches", "pairs per batch", "padded cells / unique token")
HEADER += ("row tokens / unique token", "ideal", "unique tokens / batch", "share of budget filled")
HEADER += ("ideal share", "pairs left out")


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    sets = {
        path.stem: tokenize_preferences(path, tokenizer, max_length=args.max_length)
        for path in args.data
    }
    table = [line for name, examples in sets.items() for line in lines(name, examples, args)]
    note = f"{machine('cpu')}, mean of {args.epochs} epochs, "
    note += f"at most {args.max_length} tokens a row" if args.max_length else "rows of any length"
    title = "Tokens left in batches of real preference sets"
    write_table(title, HEADER, table, args.out, note, lambda figure: draw(figure, table))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="JSONL: prompt, chosen, rejected")
    add("--pairs", type=int, default=8, help="pairs in a batch without a budget")
    add("--max-tokens", type=int, nargs="+", default=[4096], help="budgets of unique tokens")
    add("--max-length", type=int, help="longer rows are cut at the end")
    add("--epochs", type=int, default=3)
    add("--tokenizer", help="folder of a tokenizer; that of SmolLM2 if not given")
    add("--out", type=results_folder, help="folder for table and chart")
    return parser


def lines(name: str, examples: Examples, args: argparse.Namespace) -> Iterator[tuple]:
    """The lines of a set: batches by pairs, then by each budget."""
    by_pairs = PrefixSharingBatchSampler(examples, max_pairs=args.pairs, max_length=args.max_length)
    kinds = [(f"{args.pairs} pairs", None, range(len(examples)))]
    for budget in args.max_tokens:
        fitting = [i for i in range(len(examples)) if by_pairs.unique_tokens([i]) <= budget]
        kinds.append((f"{budget} tokens", budget, fitting))
    for limit, budget, kept in tqdm(kinds, desc=name):
        if not kept:
            for kind in ("random", "sampler"):
                yield name, 0, f"{kind}, {limit}", *repeat("-", len(HEADER) - 4), len(examples)
            continue
        if budget is None:
            at_random = random_batches(kept, args.pairs, args.epochs)
            shared = all_epochs(by_pairs, args.epochs)
        else:
            at_random = random_under_budget(by_pairs, kept, budget, args.epochs)
            shared = all_epochs(by_budget(examples, budget, args), args.epochs)
        whole = by_pairs.unique_tokens(kept)
        for kind, batches in (("random", at_random), ("sampler", shared)):
            values = measure(batches, examples, whole, budget, args)
            yield name, len(kept), f"{kind}, {limit}", *values, len(examples) - len(kept)


def measure(
    batches: Iterable[Sequence[int]],
    examples: Examples,
    whole: int,
    budget: int | None,
    args: argparse.Namespace,
) -> tuple[float | str, ...]:
    """What stands in a line from its pairs per batch on; `whole`: unique tokens of the set."""
    total = count(batches, examples, args.max_length)
    unique = total["unique tokens"]
    ratios = total["cells"] / unique, total["row tokens"] / unique
    ideal = total["row tokens"] / args.epochs / whole
    filled: tuple[float | str, ...] = ("-", "-")
    if budget is not None:
        fewest = ceil(unique / args.epochs / budget)
        filled = tuple(unique / budget / n for n in (total["batches"], args.epochs * fewest))
    mean = unique / total["batches"]
    return total["pairs"] / total["batches"], *ratios, ideal, mean, *filled


def count(
    batches: Iterable[Sequence[int]], examples: Examples, max_length: int | None
) -> Counter[str]:
    """What the collator's batches add up to."""
    collator = DataCollatorWithPrefixSharing(pad_token_id=0, max_length=max_length)
    total: Counter[str] = Counter()
    for batch in batches:
        tree = collator([examples[i] for i in batch])["input_ids"].prefix_tree
        total.update({"batches": 1, "pairs": len(batch), "cells": tree.padded_tokens})
        total.update({"row tokens": tree.row_tokens, "unique tokens": tree.packed_tokens})
    return total


def random_batches(examples: Sequence[int], pairs: int, epochs: int) -> Iterator[list[int]]:
    """Batches of so many pairs in random order; the last of an epoch may have fewer."""
    for order in orders(examples, epochs):
        yield from (order[i : i + pairs] for i in range(0, len(order), pairs))


def random_under_budget(
    sampler: PrefixSharingBatchSampler, examples: Sequence[int], budget: int, epochs: int
) -> Iterator[list[int]]:
    """Pairs in random order, a new batch where the next pair would exceed the budget."""
    for order in orders(examples, epochs):
        batch: list[int] = []
        for i in order:
            if batch and sampler.unique_tokens([*batch, i]) > budget:
                yield batch
                batch = []
            batch.append(i)
        yield batch


def orders(examples: Sequence[int], epochs: int) -> Iterator[list[int]]:
    return (random.Random(epoch).sample(examples, len(examples)) for epoch in range(epochs))


def by_budget(
    examples: Examples, budget: int, args: argparse.Namespace
) -> PrefixSharingBatchSampler:
    options = {"max_length": args.max_length, "oversized": "skip"}
    with warnings.catch_warnings():
        # The table says how many.
        warnings.filterwarnings("ignore", "max_tokens is .* they are left out")
        return PrefixSharingBatchSampler(examples, budget, **options)


def all_epochs(sampler: PrefixSharingBatchSampler, epochs: int) -> Iterable[list[int]]:
    return chain.from_iterable(repeat(sampler, epochs))  # it goes on to the next epoch by itself


def draw(figure: Any, table: list[tuple]) -> None:
    """Bars of what is shared, for every set."""
    sets = list(dict.fromkeys(row[0] for row in table))
    bars: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        found = (nan, nan) if row[5] == "-" else (row[5], row[6])
        bars.setdefault(row[2], []).append(found)
    grouped_bars(figure, sets, bars, "row tokens / unique token")


if __name__ == "__main__":
    main()
