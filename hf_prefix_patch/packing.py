"""Examples put together into batches within limits, groups that share a prefix first.

Knows prefixes and limits, nothing of epochs and ranks.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from hf_prefix_patch.prefix_index import Group, PrefixIndex

_LOOK_AHEAD = 32
"""Parts that may be passed over in search of one that fits, before a batch is closed."""
_CUT_COST = 0.1
"""Largest part of a batch that may be tokens that stand twice because a group was cut for it."""


class Batch(NamedTuple):
    """Examples packed together: a batch, or a part of one to be."""

    examples: list[int]
    places: list[int]  # of their rows in the index, ascending
    tokens: int


@dataclass(frozen=True)
class Packing:
    """Batches within limits from groups of examples."""

    index: PrefixIndex
    prompts: list[int]
    max_tokens: float
    max_pairs: float
    max_pairs_per_prompt: float

    def batch(self, examples: Sequence[int]) -> Batch:
        places = sorted({place for example in examples for place in self.index.places[example]})
        return Batch(list(examples), places, self.index.unique_tokens(places))

    def oversized(self) -> tuple[int, ...]:
        """Examples that fit no batch."""
        sizes = map(self.index.unique_tokens, self.index.places)
        return tuple(example for example, size in enumerate(sizes) if size > self.max_tokens)

    def pack(self, group: Group, rng: random.Random | None) -> list[Batch]:
        """Batches of a group, inner groups packed before what is left of them meets the others."""
        parts: list[Batch] = []
        for member in group:
            parts += [self.batch([member])] if isinstance(member, int) else self.pack(member, rng)
        if rng is not None:
            rng.shuffle(parts)
        return self._fill(parts)

    def split(self, batches: list[Batch], wanted: int) -> list[Batch]:
        """The batches with the largest ones cut in halves until there are as many as wanted."""
        batches = list(batches)
        while len(batches) < wanted:
            cuttable = (at for at, batch in enumerate(batches) if len(batch.examples) > 1)
            largest = max(cuttable, key=lambda at: batches[at].tokens)
            examples = batches[largest].examples
            half = len(examples) // 2
            halves = [self.batch(examples[:half]), self.batch(examples[half:])]
            batches[largest : largest + 1] = halves
        return batches

    def _fill(self, parts: Iterable[Batch]) -> list[Batch]:
        """Parts put together first fit, in order; one that does not fit may be cut."""
        waiting = deque(parts)
        batches = []
        while waiting:
            batch = waiting.popleft()
            passed: list[Batch] = []
            while waiting and len(passed) < _LOOK_AHEAD and len(batch.examples) < self.max_pairs:
                part = waiting.popleft()
                joined = self._join(batch, part)
                if joined is None:
                    passed.append(part)
                else:
                    batch = joined
            for at, part in enumerate(passed):
                if len(part.examples) > 1:
                    batch, passed[at] = self._cut(batch, part)
            waiting.extendleft(reversed(passed))
            batches.append(batch)
        return batches

    def _join(self, batch: Batch, part: Batch) -> Batch | None:
        """Both in one, or None where a limit forbids it."""
        if len(batch.examples) + len(part.examples) > self.max_pairs:
            return None
        shared = self.index.shared_tokens(batch.places, part.places)
        tokens = batch.tokens + part.tokens - shared
        if tokens > self.max_tokens:
            return None
        examples = batch.examples + part.examples
        if self.max_pairs_per_prompt < inf:
            pairs = Counter(self.prompts[example] for example in examples)
            if max(pairs.values()) > self.max_pairs_per_prompt:
                return None
        return Batch(examples, sorted(batch.places + part.places), tokens)

    def _cut(self, batch: Batch, part: Batch) -> tuple[Batch, Batch]:
        """The batch with what fits of the part, and the rest, if few tokens then stand twice."""
        filled, taken = batch, 0
        for example in part.examples:
            joined = self._join(filled, self.batch([example]))
            if joined is None:
                break
            filled, taken = joined, taken + 1
        if taken == 0:
            return batch, part
        rest = self.batch(part.examples[taken:])
        twice = filled.tokens + rest.tokens - batch.tokens - part.tokens
        return (filled, rest) if twice <= _CUT_COST * filled.tokens else (batch, part)
