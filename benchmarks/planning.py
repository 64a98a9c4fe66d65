"""Time to plan a batch of 16 rows of 4096 tokens on one core.

    python benchmarks/planning.py [--rows 16] [--length 4096] [--out benchmarks/results]

Three shapes: pairs that share three quarters of their rows, one prompt for all rows, and rows that
share nothing.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from report import machine, write_table

from hf_prefix_patch import PrefixTree


def rows_of(kind: str, rows: int, length: int) -> torch.Tensor:
    ids = torch.randint(0, 50000, (rows, length), generator=torch.Generator().manual_seed(0))
    shared = 3 * length // 4
    if kind == "pairs":
        ids[rows // 2 :, :shared] = ids[: rows // 2, :shared]
    elif kind == "one prompt":
        ids[:, :shared] = ids[0, :shared]
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="folder for the table")
    args = parser.parse_args()
    torch.set_num_threads(1)

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
    write_table(title, header, table, args.out, f"{machine()}, 1 thread")


if __name__ == "__main__":
    main()
