"""What sharing would gain on a data set: tokens of an epoch, and the FLOPs of training on it.

Counts and predicts; runs no model and prints nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hf_prefix_patch.columns import TruncationMode, check_truncation_mode
from hf_prefix_patch.flops import DecoderShape, Flops, step_flops
from hf_prefix_patch.options import check_counts
from hf_prefix_patch.pair_files import read_pairs
from hf_prefix_patch.patch import enable_prefix_sharing
from hf_prefix_patch.sampler import PrefixSharingBatchSampler
from hf_prefix_patch.tokenization import encoded, report_cuts
from hf_prefix_patch.workload import Attention, Head, Pairs, Way, total, work_of

SHARED = ("shared_across", "sampler_pairs")
"""The ways of running an epoch that the library offers with as many pairs a batch as before."""


@dataclass(frozen=True)
class Setting:
    """The training run that is asked about.

    Attributes:
        batch_size: pairs in a batch.
        max_tokens: budget of unique tokens in a batch; None for the suggested one.
        max_length: tokens that rows are cut to; None for any length.
        truncation_mode: the end of a row that stays.
        attention: of padded rows, see `work_of`.
        head: what the LM head projects, see `work_of`.
        checkpointing: layers run again in backward.
        frozen: no gradients of the model's weights, as under LoRA.
        reference: a forward pass of a reference model beside each step.
        head_again: logits are computed again in backward, as in TRL 1.16.
        epochs: that counts are averaged over.
        seed: of what is random.
    """

    batch_size: int = 8
    max_tokens: int | None = None
    max_length: int | None = 1024
    truncation_mode: TruncationMode = "keep_start"
    attention: Attention = "sdpa"
    head: Head = "completion"
    checkpointing: bool = True
    frozen: bool = True
    reference: bool = True
    head_again: bool = True
    epochs: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_truncation_mode(self.truncation_mode)
        names = ("batch_size", "max_tokens", "max_length", "epochs")
        check_counts(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class DataSet:
    """Preference pairs of a file, as a trainer sees them.

    Attributes:
        pairs: those that it keeps, rows cut.
        lengths: `[N, 3]` tokens of prompt, chosen and rejected of all that were read, uncut.
        rows_cut: rows of `pairs` that were longer.
        read_from: pairs in the file, of which a limit may have left fewer.
    """

    pairs: Pairs
    lengths: np.ndarray
    rows_cut: int
    read_from: int = 0


@dataclass(frozen=True)
class Epoch:
    """An epoch run in one way, the mean of several.

    Attributes:
        batches: steps.
        tokens: that the decoder runs on.
        most_tokens: of these in one batch.
        most_cells: of the padded rows of one batch, which all but the decoder sees.
        flops: by what they are spent on; None without a model's shape.
    """

    batches: float
    tokens: float
    most_tokens: int
    most_cells: int
    flops: Flops | None

    @property
    def cost(self) -> float:
        """FLOPs, or tokens where those are not known."""
        return self.tokens if self.flops is None else self.flops.total


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found.

    Attributes:
        data: that it was asked about.
        setting: that it was asked about.
        shape: of the model; None if tokens alone were counted.
        epochs: by the way of running them: "padded", "packed", "shared_in_pairs", "shared_across",
            "sampler_pairs", "sampler_tokens".
        max_tokens: budget of the last of them.
        suggested_max_tokens: unique tokens that take the decoder's memory of padded batches: the
            most cells that one of them has.
        refusal: why the model cannot be shared, where that is known.
    """

    data: DataSet
    setting: Setting
    shape: DecoderShape | None
    epochs: dict[str, Epoch]
    max_tokens: int
    suggested_max_tokens: int
    refusal: str | None = None

    def speed_up(self, way: str, over: str = "padded") -> float:
        """Ratio of the FLOPs of two ways, or of the tokens without a model's shape."""
        return self.epochs[over].cost / self.epochs[way].cost

    @property
    def best(self) -> str:
        """The way that costs least of those that keep the number of pairs in a batch."""
        return min(SHARED, key=lambda way: self.epochs[way].cost)

    @property
    def sharing(self) -> float:
        """What sharing gains over packing alone, at its most: by token budget too."""
        return max(self.speed_up(way, over="packed") for way in (*SHARED, "sampler_tokens"))


def read_data_set(
    path: Path,
    tokenizer: Any,
    max_length: int | None = 1024,
    truncation_mode: TruncationMode = "keep_start",
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DataSet:
    """Tokenise a file or folder of pairs. Of their tokens none are kept.

    Args:
        max_length: a pair whose prompt alone fills it is left out with "keep_start", as in TRL.
        limit: pairs to draw at random where there are more.

    Raises:
        FileNotFoundError, ModuleNotFoundError, TypeError, ValueError: as `tokenize_preferences`.
        ValueError: no pair is left.
    """
    items = read_pairs(path)
    drawn: Sequence[int] = range(len(items))
    if limit is not None and limit < len(items):
        drawn = sorted(random.Random(seed).sample(drawn, limit))
    filled = inf if max_length is None or truncation_mode != "keep_start" else max_length
    lengths: list[list[int]] = []
    cuts: list[str | None] = []

    def kept() -> Iterator[dict[str, Any]]:
        for _, record, cut in encoded((items[i] for i in drawn), len(drawn), tokenizer, progress):
            cuts.append(cut)
            lengths.append([len(ids) for ids in record.values()])
            if lengths[-1][0] < filled:
                yield record

    examples = kept()
    first = next(examples, None)
    if first is None and lengths:
        raise ValueError(
            f"the prompts of all {len(lengths)} pairs of {path} fill max_length={max_length} "
            "tokens alone, which leaves nothing of an answer; raise max_length"
        )
    if first is None:
        raise ValueError(
            f"{path} holds no example, but must hold at least one; check how it is written"
        )
    pairs = Pairs.of(chain([first], examples), max_length, truncation_mode)
    report_cuts(cuts)
    sizes = np.array(lengths)
    rows = (sizes[:, :1] + sizes[:, 1:])[sizes[:, 0] < filled]
    return DataSet(pairs, sizes, int((rows > (max_length or inf)).sum()), len(items))


def refusal_of(model: PreTrainedModel) -> str | None:
    """Why a model cannot be shared, as far as it shows without its weights; None if nothing does.

    Args:
        model: its weights are not looked at, so that of `empty_model` will do.
    """
    try:
        enable_prefix_sharing(model, verify=False).remove()
    except NotImplementedError as refusal:
        return str(refusal)
    return None


def estimate(
    data: DataSet,
    setting: Setting,
    shape: DecoderShape | None = None,
    refusal: str | None = None,
) -> Estimate:
    """Count an epoch in each way of running it, and predict what that costs.

    Args:
        data: read with the `max_length` and `truncation_mode` of the setting.
        shape: of the model; without it, tokens alone are compared.
        refusal: see `refusal_of`.

    Raises:
        ValueError: a pair has more unique tokens than `max_tokens`.
    """
    pairs, size = data.pairs, setting.batch_size
    # Every epoch has a batch that is padded to the longest row.
    suggested = 2 * min(size, len(pairs)) * int(pairs.lengths.max())
    budget = suggested if setting.max_tokens is None else setting.max_tokens
    _check_budget(pairs, budget)
    at_random = random_epochs(len(pairs), setting)
    by_pairs = PrefixSharingBatchSampler(pairs.indexed, max_pairs=size, seed=setting.seed)
    by_tokens = PrefixSharingBatchSampler(pairs.indexed, budget, seed=setting.seed)
    ways: dict[str, tuple[list[list[int]], Way]] = {
        "padded": (at_random, "padded"),
        "packed": (at_random, "packed"),
        "shared_in_pairs": (at_random, "in pairs"),
        "shared_across": (at_random, "across"),
        "sampler_pairs": (sampled_epochs(by_pairs, setting), "across"),
        "sampler_tokens": (sampled_epochs(by_tokens, setting), "across"),
    }
    epochs = {name: epoch_of(pairs, *way, setting, shape) for name, way in ways.items()}
    return Estimate(data, setting, shape, epochs, budget, suggested, refusal)


def epoch_of(
    pairs: Pairs,
    batches: Sequence[Sequence[int]],
    way: Way,
    setting: Setting,
    shape: DecoderShape | None,
) -> Epoch:
    """The mean of the setting's epochs, given the batches of all of them."""
    windows = [None] if shape is None else list(shape.heads)
    options = {"attention": setting.attention, "head": setting.head}
    works = work_of(pairs, batches, way, windows, **options)  # type: ignore[arg-type]
    rows = work_of(pairs, batches, "padded", ())
    work = total(works)
    flops = None
    if shape is not None:
        spent = step_flops(
            shape,
            work,
            checkpointing=setting.checkpointing,
            frozen=setting.frozen,
            reference=setting.reference,
            head_again=setting.head_again,
        )
        flops = Flops(*(part // setting.epochs for part in spent))
    return Epoch(
        batches=len(batches) / setting.epochs,
        tokens=work.tokens / setting.epochs,
        most_tokens=max(work.tokens for work in works),
        most_cells=max(work.tokens for work in rows),
        flops=flops,
    )


def random_epochs(count: int, setting: Setting) -> list[list[int]]:
    """Batches of pairs in random order, of several epochs; the last of each may have fewer."""
    batches = []
    for epoch in range(setting.epochs):
        order = np.random.default_rng([setting.seed, epoch]).permutation(count).tolist()
        batches += [order[i : i + setting.batch_size] for i in range(0, count, setting.batch_size)]
    return batches


def sampled_epochs(sampler: PrefixSharingBatchSampler, setting: Setting) -> list[list[int]]:
    """Batches of as many epochs of a sampler, which goes on to the next by itself."""
    return [batch for _ in range(setting.epochs) for batch in sampler]


def _check_budget(pairs: Pairs, budget: int) -> None:
    works = work_of(pairs, [[i] for i in range(len(pairs))], "in pairs")
    largest = max(work.tokens for work in works)
    over = sum(work.tokens > budget for work in works)
    if over:
        raise ValueError(
            f"max_tokens is {budget}, but {over} of {len(pairs)} pairs have more unique tokens "
            f"alone, up to {largest}; give at least {largest}, or cut rows with max_length"
        )
