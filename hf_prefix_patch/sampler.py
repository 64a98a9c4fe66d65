"""PrefixSharingBatchSampler: pairs that share text together, batches sized by unique tokens.

Knows tokenised examples, epochs and ranks, nothing of models.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import inf
from typing import Any, Literal

from torch.utils.data import Sampler

from hf_prefix_patch.columns import TruncationMode, check_truncation_mode
from hf_prefix_patch.options import check_counts, check_switches
from hf_prefix_patch.packing import Batch, Packing
from hf_prefix_patch.prefix_index import IndexedExamples, read_index

_TRIALS = 3
"""Epochs whose packings say how many batches one needs, and packings that a later epoch may try; at
most one epoch in twenty finds none and takes the batches of the first."""


class PrefixSharingBatchSampler(Sampler[list[int]]):
    """Batches of preference pairs, for `DataLoader(batch_sampler=...)`.

    Pairs with the same prompt or another long common prefix come together, so that more of a batch
    is shared, and batches are filled by the tokens that are left: those of the packed row that
    `PrefixTree.from_rows` makes of the right-padded rows, exactly.

    An epoch has every pair once, and every epoch has the same number of batches, so that `len` is
    exact. Groups meet in another order and in other batches in each epoch, but the pairs of a group
    stay together: gradients of a batch are less diverse than with independent draws. Where that
    matters, `max_pairs_per_prompt` bounds it; each prompt is then computed in more batches. The
    number of pairs differs between batches, with `max_pairs` alone too: a group is not cut to fill
    a batch where the tokens that both parts would compute are more than a tenth of it.

    On several ranks, each step takes `num_replicas` batches of about as many unique tokens. Under
    accelerate, which deals batches out itself, give `num_replicas` and leave `rank` None.

    An epoch that was read to its end is followed by the next; `set_epoch` goes to another one.

    Args:
        data: tokenised examples, a `datasets.Dataset` or a sequence of mappings, with the columns
            that `DataCollatorWithPrefixSharing` takes; or what `index_examples` made of them, rows
            cut by it.
        max_tokens: unique tokens in a batch; None for no limit.
        max_pairs: pairs in a batch; None for no limit. One of the two must be given.
        max_pairs_per_prompt: pairs with an identical prompt in a batch; None for no limit.
        max_length: tokens that each row is cut to, as in the collator.
        truncation_mode: the end of a row that stays, as in the collator.
        shuffle: False for the same batches in the same order in every epoch.
        seed: of the shuffling, together with the epoch.
        longest_first: begin every epoch with the step that has the batch of most unique tokens, so
            that memory runs out at once or not at all.
        oversized: what to do with a pair of more than `max_tokens` unique tokens, `"raise"` or
            `"skip"`.
        num_replicas: number of ranks; the number of batches is a multiple of it.
        rank: yield the batches of this rank; None for those of all ranks, step after step.
        progress: show a bar while the data is read.

    Attributes:
        skipped: indices of the pairs that are left out as oversized.

    Raises:
        ValueError: no limit or one below 1, data that is empty, without the columns of tokenised
            examples or too little for the ranks, a pair over the budget, an unknown option, or a
            rank out of range.
        TypeError: data without length or indexing, or an option of another type.

    Examples:
        >>> data = [
        ...     {"prompt_ids": [1, 2, 3, p], "chosen_ids": [c], "rejected_ids": [9]}
        ...     for p, c in [(4, 6), (5, 6), (4, 7), (5, 7)]
        ... ]
        >>> sampler = PrefixSharingBatchSampler(data, max_tokens=8)
        >>> sorted(sorted(batch) for batch in sampler)
        [[0, 2], [1, 3]]
        >>> sampler.unique_tokens([0, 2]), sampler.unique_tokens([0, 1])
        (7, 9)
    """

    def __init__(
        self,
        data: Any,
        max_tokens: int | None = None,
        *,
        max_pairs: int | None = None,
        max_pairs_per_prompt: int | None = None,
        max_length: int | None = None,
        truncation_mode: TruncationMode = "keep_start",
        shuffle: bool = True,
        seed: int = 0,
        longest_first: bool = False,
        oversized: Literal["raise", "skip"] = "raise",
        num_replicas: int = 1,
        rank: int | None = None,
        progress: bool = False,
    ) -> None:
        limits = {
            "max_tokens": max_tokens,
            "max_pairs": max_pairs,
            "max_pairs_per_prompt": max_pairs_per_prompt,
        }
        if max_tokens is None and max_pairs is None:
            raise ValueError(
                "neither max_tokens nor max_pairs is given, but a batch needs a limit; give the "
                "unique tokens that fit in memory as max_tokens, or max_pairs"
            )
        check_counts(**limits, max_length=max_length)
        check_switches(shuffle=shuffle, longest_first=longest_first, progress=progress)
        _check_options(truncation_mode, oversized, num_replicas, rank)
        self._num_replicas, self._rank = num_replicas, rank
        self._shuffle, self._seed, self._longest_first = shuffle, seed, longest_first
        if not isinstance(data, IndexedExamples):
            data = read_index(data, max_length, truncation_mode, progress)
        index, prompts = data
        if max_pairs_per_prompt is not None and max(prompts) < 0:
            raise ValueError(
                f"max_pairs_per_prompt is {max_pairs_per_prompt}, but the examples have no prompt; "
                "give data with prompt_ids or leave it out"
            )
        self._packing = Packing(
            index, prompts, *(inf if limit is None else limit for limit in limits.values())
        )
        self.skipped = self._packing.oversized()
        if self.skipped:
            self._report_oversized(oversized)
        kept = sorted(set(range(len(index.places))).difference(self.skipped))
        self._groups = index.groups(kept, prompts)
        self._num_pairs = len(kept)
        self._num_batches = self._choose_num_batches()
        self._epoch, self._start, self._done = 0, 0, 0

    def __len__(self) -> int:
        """Batches that an epoch yields."""
        return self._num_batches // (1 if self._rank is None else self._num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of the examples of each batch, from where `load_state_dict` says."""
        epoch, self._done, self._start = self._epoch, self._start, 0
        for batch in self._batches(epoch)[self._done :]:
            self._done += 1
            yield batch.examples
        if self._epoch == epoch:
            self.set_epoch(epoch + 1)

    @property
    def pairs_per_batch(self) -> float:
        """Mean number of pairs in a batch."""
        return self._num_pairs / self._num_batches

    def unique_tokens(self, batch: Sequence[int]) -> int:
        """Packed tokens of the rows of these examples; `batch` has indices into the data."""
        return self._packing.batch(batch).tokens

    def set_epoch(self, epoch: int) -> None:
        """Yield the batches of `epoch` next, from the first, or from where a loaded state says.

        A loader that accelerate prepared for several processes does not pass its own `set_epoch`
        on: after `skip_first_batches`, call this one.
        """
        if epoch != self._epoch:
            self._epoch, self._start, self._done = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, the number of batches that this sampler has yielded in it, and that of all.

        A loader with workers takes batches ahead of the training; save counts of the training loop
        under the same names instead.
        """
        return {"epoch": self._epoch, "batches": self._done, "batches_per_epoch": len(self)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken, given the same data and arguments.

        Raises:
            ValueError: no state of a sampler, or one whose epochs have another number of batches.
        """
        if not {"epoch", "batches"} <= set(state):
            raise ValueError(
                f"the state has {sorted(state)}, but needs epoch and batches; give what state_dict "
                "returned"
            )
        epoch, batches = state["epoch"], state["batches"]
        of = state.get("batches_per_epoch", len(self))
        if of != len(self) or not 0 <= batches <= of:
            raise ValueError(
                f"the state has {batches} of {of} batches of an epoch, but an epoch has "
                f"{len(self)}; load the state of a sampler of the same data with the same arguments"
            )
        self._epoch, self._start, self._done = epoch, batches, batches

    def _report_oversized(self, oversized: str) -> None:
        """Raise or warn, as asked for."""
        named = [f"index {i} has {self.unique_tokens([i])}" for i in self.skipped[:3]]
        if len(self.skipped) > 3:
            named.append(f"and {len(self.skipped) - 3} more")
        most = max(self.unique_tokens([i]) for i in self.skipped)
        message = (
            f"max_tokens is {self._packing.max_tokens}, but the unique tokens of "
            f"{len(self.skipped)} pairs exceed it ({', '.join(named)}; up to {most})"
        )
        if oversized == "raise":
            raise ValueError(
                f"{message}; raise max_tokens to {most}, cut rows with max_length, or leave such "
                'pairs out with oversized="skip"'
            )
        warnings.warn(
            f"{message}; they are left out; raise max_tokens or cut rows with max_length to have "
            "them",
            stacklevel=3,
        )

    def _choose_num_batches(self) -> int:
        """Batches in every epoch: enough for any of the first ones."""
        ranks = self._num_replicas
        most = self._num_pairs // ranks * ranks  # no batch is empty
        if most == 0:
            raise ValueError(
                f"{self._num_pairs} pairs are within the limits ({len(self.skipped)} exceed "
                f"max_tokens), but each of num_replicas={ranks} ranks needs one; give more data, "
                "raise max_tokens or use fewer ranks"
            )
        epochs = range(_TRIALS if self._shuffle else 1)
        counts = [len(self._packing.pack(self._groups, self._rng(epoch))) for epoch in epochs]
        chosen = min(-(-max(counts) // ranks) * ranks, most)
        if chosen < counts[0]:
            raise ValueError(
                f"{self._num_pairs} pairs make {counts[0]} batches within the limits, which cannot "
                f"be split into a multiple of num_replicas={ranks}; raise max_tokens or max_pairs, "
                f"or leave {self._num_pairs - most} pairs out of the data"
            )
        return chosen

    def _rng(self, epoch: int) -> random.Random | None:
        return random.Random(f"{self._seed} {epoch}") if self._shuffle else None

    def _batches(self, epoch: int) -> list[Batch]:
        """The batches of an epoch in order, of this rank."""
        rng = self._rng(epoch)
        for _ in range(_TRIALS):
            batches = self._packing.pack(self._groups, rng)
            if len(batches) <= self._num_batches:
                break
        else:
            # Few enough, because `_num_batches` was chosen so.
            batches = self._packing.pack(self._groups, self._rng(0))
        batches = self._packing.split(batches, self._num_batches)
        ordered = self._in_order(batches, rng)
        return ordered if self._rank is None else ordered[self._rank :: self._num_replicas]

    def _in_order(self, batches: list[Batch], rng: random.Random | None) -> list[Batch]:
        """Steps of batches of similar size, end to end."""
        ranks = self._num_replicas
        ascending = sorted(batches, key=lambda batch: batch.tokens)
        steps = [ascending[i : i + ranks] for i in range(0, len(ascending), ranks)]
        longest = steps.pop() if self._longest_first else []
        if rng is None:
            steps.sort(key=lambda step: min(step[0].examples))
        else:
            rng.shuffle(steps)
            for step in [longest, *steps]:
                rng.shuffle(step)
        return [*longest, *chain.from_iterable(steps)]


def _check_options(
    truncation_mode: str, oversized: str, num_replicas: int, rank: int | None
) -> None:
    check_truncation_mode(truncation_mode)
    if oversized not in ("raise", "skip"):
        raise ValueError(
            f"oversized is {oversized!r}, but must be 'raise' or 'skip'; leave it out to be told"
        )
    check_counts(num_replicas=num_replicas)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(
            f"rank is {rank!r}, but must be an integer; leave it out for the batches of all ranks"
        )
    if rank is not None and not 0 <= rank < num_replicas:
        raise ValueError(
            f"rank is {rank}, but must lie in [0, {num_replicas - 1}] for num_replicas="
            f"{num_replicas}; leave it out for the batches of all ranks"
        )
