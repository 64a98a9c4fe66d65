"""PrefixIndex: what the rows of a data set share, without keeping their tokens.

Knows tokenised examples and numpy, nothing of batches.
"""

from __future__ import annotations

from array import array
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Union

import numpy as np
from torch.utils.data import IterableDataset
from tqdm import tqdm  # type: ignore[import-untyped]

from hf_prefix_patch.columns import TruncationMode, rows_of
from hf_prefix_patch.trie import common_prefix

Group = list[Union[int, "Group"]]
"""Examples that share a prefix, and groups of them that share a longer one."""

_NOTABLE = 0.1
"""Sharing below this part of what examples cost is left to chance: grouped by every common first
word, they could not be shuffled."""
_CHUNK = 1000
"""Examples that are read from a `datasets.Dataset` at once."""


class PrefixIndex:
    """Unique tokens of any rows of a data set, exactly as `PrefixTree` packs right-padded ones.

    Rows are sorted as byte strings of fixed-width tokens, and a row is named by its place in that
    order. Two rows share as many tokens as the least that neighbours between them share, which a
    table of minima answers in constant time; the tokens themselves are not kept.

    Args:
        examples: the rows of each example, every row `[L]` token ids in `[0, 2**31)`.

    Attributes:
        places: for each example the places of its rows, ascending.
        lengths: tokens of the row at each place.

    Examples:
        >>> pairs = [[[5, 6, 7], [5, 6, 8]], [[5, 6, 7, 9], [4]]]
        >>> index = PrefixIndex([np.array(ids) for ids in pair] for pair in pairs)
        >>> index.places
        [(1, 3), (0, 2)]
        >>> index.unique_tokens([1, 3]), index.unique_tokens([0, 2])
        (4, 5)
        >>> index.shared_tokens([1, 3], [0, 2]), index.unique_tokens([0, 1, 2, 3])
        (3, 6)
    """

    def __init__(self, examples: Iterable[Sequence[np.ndarray]]) -> None:
        rows: list[bytes] = []
        ends = [0]
        for example in examples:
            rows += [ids.astype(np.int32).tobytes() for ids in example]
            ends.append(len(rows))
        order = sorted(range(len(rows)), key=rows.__getitem__)
        place = np.empty(len(rows), np.int64)
        place[order] = np.arange(len(rows))
        self.places = [tuple(sorted(place[i:j].tolist())) for i, j in pairwise(ends)]
        tokens = [np.frombuffer(rows[row], np.int32) for row in order]
        self.lengths = array("i", map(len, tokens))
        self._minima = _window_minima([common_prefix(a, b) for a, b in pairwise(tokens)])

    def common_prefix(self, low: int, high: int) -> int:
        """Tokens that the rows at two places, `low < high`, begin with alike."""
        level = (high - low).bit_length() - 1
        minima = self._minima[level]
        return min(minima[low], minima[high - (1 << level)])

    def common_prefixes(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """`common_prefix` of many pairs of places at once, all 1-D of one length."""
        levels = np.frexp(high - low)[1] - 1
        shared = np.empty(len(low), np.int64)
        for level, minima in enumerate(self._minima):
            of_level = np.flatnonzero(levels == level)
            values = np.frombuffer(minima, np.int32)
            last = high[of_level] - (1 << level)
            shared[of_level] = np.minimum(values[low[of_level]], values[last])
        return shared

    def unique_tokens(self, places: Sequence[int]) -> int:
        """Packed tokens of the rows at these places, which ascend."""
        shared = sum(self.common_prefix(a, b) for a, b in pairwise(places))
        return sum(self.lengths[place] for place in places) - shared

    def shared_tokens(self, places: Sequence[int], others: Sequence[int]) -> int:
        """Packed tokens that two sets of rows have in common; both ascend, no row is in both.

        `others` is taken in runs that lie between two neighbours of `places`. Only prefixes at the
        ends of the runs differ between the sum of both sets and their union.
        """
        shared, start = 0, 0
        while start < len(others):
            after = bisect(places, others[start])
            end = bisect(others, places[after], start) if after < len(places) else len(others)
            if after > 0:
                shared += self.common_prefix(places[after - 1], others[start])
            if after < len(places):
                shared += self.common_prefix(others[end - 1], places[after])
            if 0 < after < len(places):
                shared -= self.common_prefix(places[after - 1], places[after])
            if end < len(others):
                shared -= self.common_prefix(others[end - 1], others[end])
            start = end
        return shared

    def groups(self, examples: Sequence[int], prompts: Sequence[int]) -> Group:
        """Groups in groups of examples that are worth packing together.

        Examples that begin alike are a group if they have one prompt, or if what they share beyond
        the group around them is a notable part of their unique tokens, taken in the mean.

        Args:
            examples: those to group.
            prompts: for every example of the index a number that stands for its prompt.
        """
        ordered = sorted(examples, key=lambda example: self.places[example][0])
        firsts = [self.places[example][0] for example in ordered]
        shared = [self.common_prefix(a, b) for a, b in pairwise(firsts)]
        tokens = _running_sum(self.unique_tokens(self.places[example]) for example in ordered)
        changes = _running_sum(prompts[a] != prompts[b] for a, b in pairwise(ordered))
        runs = defaultdict(list)
        for start, end, prefix in _runs(shared):
            runs[start].append((end, prefix))
        open_groups = [_Open([], len(ordered), min(shared, default=0), changes[-1] == 0)]
        for at, example in enumerate(ordered):
            while open_groups[-1].end == at:
                open_groups.pop()
            for end, prefix in runs.get(at, ()):
                around = open_groups[-1]
                one_prompt = changes[end - 1] == changes[at]
                mean = (tokens[end] - tokens[at]) / (end - at)
                gained = prefix - around.prefix
                if (one_prompt and not around.one_prompt) or gained >= _NOTABLE * mean > 0:
                    open_groups.append(_Open([], end, prefix, one_prompt))
                    around.members.append(open_groups[-1].members)
            open_groups[-1].members.append(example)
        return open_groups[0].members


class _Open(NamedTuple):
    """A group that examples are being put into, up to `end`, and what all of them share."""

    members: Group
    end: int
    prefix: int
    one_prompt: bool


class IndexedExamples(NamedTuple):
    """The index of a data set's rows, and for each example a number that stands for its prompt."""

    rows: PrefixIndex
    prompts: list[int]


def read_index(
    data: Any,
    max_length: int | None,
    truncation_mode: TruncationMode,
    progress: bool,
) -> IndexedExamples:
    """The index of a data set's rows.

    Raises:
        ValueError: data without examples, or without the columns of tokenised ones.
        TypeError: data without length or indexing, or with columns of another type.
    """
    if isinstance(data, Mapping | IterableDataset) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    ):
        raise TypeError(
            f"data is a {type(data).__name__}, but batches by size and by what examples share need "
            "a sequence of examples; give one split, as a datasets.Dataset or a list"
        )
    if len(data) == 0:
        raise ValueError("data has no examples, but at least one is needed; check how it is loaded")
    return index_examples(_examples(data, progress), max_length, truncation_mode)


def index_examples(
    examples: Iterable[Mapping[str, Any]],
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
) -> IndexedExamples:
    """The index of the rows of tokenised examples, each of which is read once and not kept.

    Prompts are compared before they are cut. An example without one has a negative number of its
    own.
    """
    numbers: dict[bytes, int] = {}
    prompts: list[int] = []

    def rows() -> Iterator[list[np.ndarray]]:
        for i, example in enumerate(examples):
            ids, length = rows_of(example, where=f"example {i}")[0]
            prompt = blake2b(ids[:length].tobytes()).digest()
            number = numbers.setdefault(prompt, len(numbers)) if length else -1 - len(prompts)
            prompts.append(number)
            yield [row.ids for row in rows_of(example, max_length, truncation_mode)]

    return IndexedExamples(PrefixIndex(rows()), prompts)


def _examples(data: Any, progress: bool) -> Iterator[Mapping[str, Any]]:
    columns = [name for name in getattr(data, "column_names", ()) if name.endswith("_ids")]
    transformed = columns and data.format["type"] == "custom"  # `set_transform`
    if transformed or not columns:
        for index in tqdm(range(len(data)), desc="reading examples", disable=not progress):
            yield data[index]
        return
    # Five times as fast as one by one.
    arrays = data.with_format("numpy", columns=columns)
    with tqdm(total=len(data), desc="reading examples", disable=not progress) as bar:
        for start in range(0, len(data), _CHUNK):
            chunk = arrays[start : start + _CHUNK]
            for values in zip(*chunk.values(), strict=True):
                yield dict(zip(chunk, values, strict=True))
            bar.update(min(_CHUNK, len(data) - start))


def _window_minima(values: Sequence[int]) -> list[array[int]]:
    """For each level `k`, the least of every `2**k` neighbouring values."""
    window = np.array(values, np.int32)
    levels: list[array[int]] = []
    while len(window):
        # Read one by one, an array is several times faster than numpy.
        levels.append(array("i", window.tobytes()))
        half = 1 << (len(levels) - 1)
        window = np.minimum(window[:-half], window[half:])
    return levels


def _running_sum(values: Iterable[int]) -> list[int]:
    return list(accumulate(values, initial=0))


def _runs(shared: Sequence[int]) -> list[tuple[int, int, int]]:
    """All longest runs of items that begin alike, as (start, end, prefix), outer ones first.

    `shared` holds what each item shares with the next. The runs are the inner nodes of a suffix
    tree, found as in Abouelhoda et al. 2004, "Replacing suffix trees with enhanced suffix arrays",
    section 3.
    """
    found = []
    open_runs: list[tuple[int, int]] = []  # start and prefix, prefixes ascending
    for at, prefix in enumerate([*shared, -1]):
        start = at
        while open_runs and open_runs[-1][1] > prefix:
            start, inner = open_runs.pop()
            found.append((start, at + 1, inner))
        if not open_runs or open_runs[-1][1] < prefix:
            open_runs.append((start, prefix))
    return sorted(found, key=lambda run: (run[0], -run[1]))
