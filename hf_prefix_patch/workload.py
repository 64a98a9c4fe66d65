"""What a decoder runs on in batches of a data set: padded, packed, shared.

Counts tokens and pairs of queries and keys from lengths and from the index of what rows share,
without making a batch. A packed token at depth `d` sees `d` keys, so that a row which is `n` long
and shares its first `m` tokens with the row before it in the index adds `n - m` tokens, and the
pairs of `n` without those of `m`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from hf_prefix_patch.columns import TruncationMode, rows_of
from hf_prefix_patch.flops import Window, Work, visible_pairs
from hf_prefix_patch.prefix_index import IndexedExamples, index_examples

Way = Literal["padded", "packed", "in pairs", "across"]
"""Rows of one length; rows without padding; prompts shared by the rows of a pair; or by all."""

Attention = Literal["sdpa", "flash"]
Head = Literal["completion", "cells"]


@dataclass(frozen=True)
class Pairs:
    """Preference pairs that batches are made of, rows cut to what a trainer keeps of them.

    Attributes:
        indexed: the index of their rows.
        places: `[P, 2]` int64, where in the index these are, ascending in each pair.
        lengths: `[P, 2]` int64, tokens of each row, chosen and rejected.
        prompts: `[P, 2]` int64, how many of these are of the prompt.
    """

    indexed: IndexedExamples
    places: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray

    @classmethod
    def of(
        cls,
        examples: Iterable[Mapping[str, Any]],
        max_length: int | None = None,
        truncation_mode: TruncationMode = "keep_start",
    ) -> Pairs:
        """Read tokenised examples once; none is kept."""
        sizes: list[list[tuple[int, int]]] = []

        def noted() -> Iterable[Mapping[str, Any]]:
            for example in examples:
                rows = rows_of(example, max_length, truncation_mode)
                sizes.append([(len(row.ids), row.prompt_length) for row in rows])
                yield example

        indexed = index_examples(noted(), max_length, truncation_mode)
        lengths, prompts = np.array(sizes, np.int64).transpose(2, 0, 1)
        return cls(indexed, np.array(indexed.rows.places), lengths, prompts)

    def __len__(self) -> int:
        return len(self.lengths)


def work_of(
    pairs: Pairs,
    batches: Sequence[Sequence[int]],
    way: Way,
    windows: Iterable[Window] = (None,),
    *,
    attention: Attention = "sdpa",
    head: Head = "completion",
) -> list[Work]:
    """The work of a forward pass over each batch.

    Args:
        batches: indices of pairs.
        windows: for which to count pairs of queries and keys.
        attention: of padded rows. `"sdpa"` computes all cells of a row's square where it is given a
            mask: in a batch that has padding, and in layers with a window shorter than the row.
            `"flash"` leaves padding and what is masked out. Packed rows are attended to by this
            library, which computes visible pairs only.
        head: what the LM head projects: `"completion"` tokens (TRL on CUDA, `completion_logps`), or
            all `"cells"` of the padded rows but the last (TRL elsewhere).
    """
    members = np.fromiter(chain.from_iterable(batches), np.int64)
    counts = np.array([len(batch) for batch in batches])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    row_counts, row_starts = 2 * counts, 2 * starts
    lengths = pairs.lengths[members].reshape(-1)
    longest = np.maximum.reduceat(lengths, row_starts)
    if head == "cells":
        head_tokens = row_counts * (longest - 1)
    else:
        # Nothing stands before a first token to predict it.
        targets = pairs.lengths - np.maximum(pairs.prompts, 1)
        head_tokens = np.add.reduceat(targets[members].sum(1), starts)
    own, shared = lengths, np.zeros_like(lengths)
    if way in ("in pairs", "across"):
        own, shared = _in_index_order(pairs, members, counts, way)
    cells = row_counts * longest
    tokens = cells if way == "padded" else np.add.reduceat(own - shared, row_starts)
    no_padding = np.add.reduceat(lengths, row_starts) == cells

    def computed(window: Window) -> np.ndarray:
        if way == "padded" and attention == "sdpa":
            causal = no_padding & (window is None or longest <= window)
            return row_counts * np.where(causal, visible_pairs(longest, window), longest**2)
        added = visible_pairs(own, window) - visible_pairs(shared, window)
        return np.add.reduceat(added, row_starts)

    scores = {window: computed(window) for window in windows}
    return [
        Work(int(n), {window: int(p[i]) for window, p in scores.items()}, int(h))
        for i, (n, h) in enumerate(zip(tokens, head_tokens, strict=True))
    ]


def total(works: Sequence[Work]) -> Work:
    """The sum of work."""
    windows = works[0].pairs
    return Work(
        sum(work.tokens for work in works),
        {window: sum(work.pairs[window] for work in works) for window in windows},
        sum(work.head_tokens for work in works),
    )


def _in_index_order(
    pairs: Pairs, members: np.ndarray, counts: np.ndarray, way: Way
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, batch after batch, its length and the tokens that an earlier one has."""
    index = pairs.indexed.rows
    places = pairs.places[members].reshape(-1)
    sizes = np.ones_like(members) if way == "in pairs" else counts  # of what may share, in pairs
    unit = np.repeat(np.arange(len(sizes)), 2 * sizes)
    order = np.lexsort((places, unit))
    places, unit = places[order], unit[order]
    own = np.asarray(index.lengths, np.int64)[places]
    shared = np.zeros_like(own)
    inside = np.flatnonzero(unit[1:] == unit[:-1]) + 1
    shared[inside] = index.common_prefixes(places[inside - 1], places[inside])
    return own, shared
