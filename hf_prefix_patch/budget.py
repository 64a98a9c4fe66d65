"""Batches by token budget in a trainer: its data loader, and the weight of each batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from hf_prefix_patch.callbacks import SetEpoch
from hf_prefix_patch.collator import DataCollatorWithPrefixSharing
from hf_prefix_patch.columns import IMAGES, TruncationMode
from hf_prefix_patch.notices import warn_caller
from hf_prefix_patch.planned import PlannedTensor
from hf_prefix_patch.sampler import PrefixSharingBatchSampler
from hf_prefix_patch.wrappers import called_module

_BY_DEFAULT = "random"
_STOCK = ("transformers.", "trl.", "peft.")  # whose losses divide by what they are handed
_COUNTED = 3  # examples whose tokens are counted in the trainer's batches too


class TokenBudget:
    """Training batches of at most so many unique tokens, in which every pair weighs the same.

    A trainer averages the loss over the pairs of a batch, and gradients over batches. With batches
    of different sizes a pair would weigh the more the fewer it is with. The loss of a batch of `n`
    pairs is therefore multiplied by `n / m`, where `m` is the mean number of pairs in the batches
    of an epoch: each pair has the weight `1 / m`, as with fixed batches of `m` pairs. What is
    logged stays the mean over the pairs of each batch. Losses that the trainer divides by the
    number of target tokens in a step are left as they are; where rows have one target each, as in
    classification, the mean over rows is taken instead.

    Args:
        trainer: a `transformers.Trainer` with a tokenised `train_dataset`.
        max_tokens: unique tokens in a batch.
        options: further arguments of `PrefixSharingBatchSampler`.

    Attributes:
        in_force: whether the trainer makes its batches by it. A loss of the user's own around this
            one stays in the trainer when sharing is removed, and weighs no more.
        has_dealt: whether the trainer has asked for batches; before, it trains on its own.

    Raises:
        ValueError: an option of the trainer that chooses batches too; and as the sampler.
        TypeError: as the sampler.
    """

    in_force = False

    def __init__(self, trainer: Any, max_tokens: int, options: Mapping[str, Any]) -> None:
        _check_arguments(trainer)
        _check_sampler_options(options)
        self._trainer, self._max_tokens, self._options = trainer, max_tokens, dict(options)
        self._said = False
        self.has_dealt = False
        self._counted = _counted_in(trainer)
        self.sampler = self._count(*self._counted)
        self.callback = SetEpoch(self.sampler)
        self._compute_loss, self._training_step = trainer.compute_loss, trainer.training_step
        self._gather = trainer.accelerator.gather

    def _count(
        self, dataset: Any, max_length: int | None, truncation_mode: TruncationMode
    ) -> PrefixSharingBatchSampler:
        args = self._trainer.args
        ours = {
            "max_length": max_length,
            "truncation_mode": truncation_mode,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "num_replicas": self._trainer.accelerator.num_processes,
            "progress": not args.disable_tqdm,
        }
        options = ours | self._options
        try:
            sampler = PrefixSharingBatchSampler(dataset, self._max_tokens, **options)
        except ValueError as error:
            error.add_note(
                "In a trainer max_tokens is max_tokens_per_batch, max_length an argument of the "
                'trainer, and the rest goes into sampler_options, as {"oversized": "skip"}'
            )
            raise
        self._row_names, self._rows_per_pair = self._check_rows(sampler)
        return sampler

    @property
    def overrides(self) -> list[tuple[Any, str, Any]]:
        """Methods of the trainer and its accelerator that are replaced: owner, name, by what."""
        trainer = self._trainer
        replaced = [
            (trainer, "get_train_dataloader", self.dataloader),
            (trainer, "compute_loss", self.compute_loss),
            (trainer, "training_step", self.training_step),
            (trainer, "get_total_train_batch_size", self.total_batch_size),
        ]
        if trainer.accelerator.num_processes > 1:
            replaced.append((trainer.accelerator, "gather", self.gather))
        return replaced

    @property
    def settings(self) -> dict[str, Any]:
        """What the batches of an epoch depend on, as JSON has it."""
        return {
            "batches_per_epoch": len(self.sampler),
            "max_tokens_per_batch": int(self._max_tokens),
            "sampler_options": {name: str(x) for name, x in sorted(self._options.items())},
        }

    def dataloader(self) -> DataLoader[Any]:
        """What `Trainer.get_train_dataloader` gives, over the batches of the sampler."""
        counted = _counted_in(self._trainer)
        if counted[0] is not self._counted[0] or counted[1:] != self._counted[1:]:
            # In place, as the handle and the callback know this one.
            vars(self.sampler).update(vars(self._count(*counted)))
            self._counted = counted
        self.has_dealt = True
        args = self._trainer.args
        dataset, collator = self._data()
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self.sampler,
            collate_fn=_WithinBudget(collator, self._row_names, self._max_tokens),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
            in_order=getattr(args, "dataloader_in_order", True),
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        prepared: DataLoader[Any] = self._trainer.accelerator.prepare(loader)
        return prepared

    def _data(self) -> tuple[Any, Any]:
        """Data set and collator, columns that the model does not take removed in either."""
        trainer, dataset = self._trainer, self._trainer.train_dataset
        collator = DataCollatorWithPrefixSharing.wrap(trainer.data_collator)
        if hasattr(dataset, "column_names"):
            return trainer._remove_unused_columns(dataset, description="training"), collator
        return dataset, trainer._get_collator_with_removed_columns(collator, description="training")

    def _check_rows(self, sampler: PrefixSharingBatchSampler) -> tuple[list[str], int]:
        """The tensors of rows in the trainer's batches, and how many rows an example makes.

        Raises:
            ValueError: there is none, or it holds other tokens than the sampler counts.
        """
        dataset, collator = self._data()
        kept = sorted(set(range(len(dataset))) - set(sampler.skipped))
        longest = max(kept, key=lambda i: sampler.unique_tokens([i]))
        groups = [[i] for i in (*kept[:_COUNTED], longest)]
        groups.append(next(iter(copy(sampler))))
        with torch.random.fork_rng(devices=[]):
            batches = [collator([dataset[i] for i in group]) for group in groups]
        names = [
            name
            for name, x in batches[0].items()
            if name.endswith("input_ids") and isinstance(x, PlannedTensor)
        ]
        if not names:
            raise ValueError(
                f"the trainer's collator makes batches of {sorted(batches[0])}, but "
                "max_tokens_per_batch needs rows of input_ids to count; use one that yields rows"
            )
        rows = [batch[names[0]].shape[0] for batch in batches]
        seen = [_packed_tokens(batch, names) for batch in batches]
        counted = [sampler.unique_tokens(group) for group in groups]
        if seen != counted or rows != [rows[0] * len(group) for group in groups]:
            raise ValueError(
                f"{type(self._trainer).__name__} makes other rows than max_tokens_per_batch counts "
                "in the columns of its data set: its batches of the first examples, the longest "
                f"one, and a batch by budget have {seen} unique tokens in {rows} rows, where "
                f"{counted} are counted, padded on the right; leave it out, sharing serves the "
                "trainer's own batches too"
            )
        return names, rows[0]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss, in training times the weight of the batch."""
        result = self._compute_loss(model, inputs, *args, **kwargs)
        in_force = self.in_force and self.has_dealt and self._trainer.model.training
        by_tokens = kwargs.get("num_items_in_batch") is not None
        if in_force and by_tokens:
            self._say_by_tokens()
        if not in_force or by_tokens:
            return result
        pairs = inputs[self._row_names[0]].shape[0] / self._rows_per_pair
        self._weight = pairs / self.sampler.pairs_per_batch
        if isinstance(result, tuple):
            return (result[0] * self._weight, *result[1:])
        return result * self._weight

    def _say_by_tokens(self) -> None:
        """A loss of the user's own may be handed the number of targets and not divide by it."""
        own = self._own_losses()
        if self._said or not own:
            return
        self._said = True
        warn_caller(
            f"prefix sharing: the trainer hands num_items_in_batch to {own[0]}, as its batches "
            "have labels; the loss must be divided by that, and is not weighted by pairs. If it is "
            "a mean over pairs, set trainer.model_accepts_loss_kwargs = False (and move a "
            "compute_loss_func into compute_loss)"
        )

    def _own_losses(self) -> list[str]:
        """What of the user's own is handed the number of targets of a step."""
        handed = {
            "compute_loss": self._compute_loss,
            "forward": type(called_module(self._trainer.model)).forward,
            "compute_loss_func": self._trainer.compute_loss_func,
        }
        homes = {name: getattr(x, "__module__", None) or "" for name, x in handed.items() if x}
        return [f"{x} of {home}" for x, home in homes.items() if not home.startswith(_STOCK)]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's, whose result it logs: without the weight.

        Where rows have one target each, the number of targets is that of the pairs in a step, which
        differs from step to step, and not all losses are divided by it: the trainer takes the mean.
        """
        in_force = self.in_force and self.has_dealt
        if in_force and _are_of_rows(inputs.get("labels")) and not self._own_losses():
            args, kwargs = (), {}  # num_items_in_batch
        self._weight = 1.0
        return self._training_step(model, inputs, *args, **kwargs) / self._weight

    def gather(self, tensor: Any) -> Any:
        """The accelerator's, for tensors that are longer on one process than on another: trainers
        gather a number for each pair."""
        gathered: Any = recursively_apply(self._gather_one, tensor)
        return gathered

    def _gather_one(self, tensor: Tensor) -> Any:
        if tensor.ndim == 0:
            return self._gather(tensor)
        sizes = self._gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        if len(set(sizes)) == 1:
            return self._gather(tensor)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        pieces = self._gather(padded).split(max(sizes))
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    def total_batch_size(self, args: Any) -> int:
        """Pairs in a step of all processes, in the mean; the trainer counts samples with it."""
        steps: int = args.gradient_accumulation_steps * self._trainer.accelerator.num_processes
        return round(self.sampler.pairs_per_batch * steps)


class _WithinBudget:
    """A collator whose batches are counted once more: not all of its rows need be as those that
    were compared."""

    def __init__(self, collator: Callable[..., Any], names: list[str], max_tokens: int) -> None:
        self._collator, self._names, self._max_tokens = collator, names, max_tokens

    def __call__(self, examples: Any) -> Any:
        batch = self._collator(examples)
        tokens = _packed_tokens(batch, self._names)
        if tokens > self._max_tokens:
            raise ValueError(
                f"a batch of {len(examples)} examples has {tokens} unique tokens, more than "
                f"max_tokens_per_batch={self._max_tokens}: the collator makes other rows than the "
                "columns of the data set say, or pads on the left, where rows of different length "
                "share nothing; pad on the right, or leave max_tokens_per_batch out"
            )
        return batch


def _are_of_rows(labels: Any) -> bool:
    """Whether labels are a class, a number or some numbers for each row, and not tokens."""
    return isinstance(labels, Tensor) and (labels.ndim < 2 or labels.is_floating_point())


def _counted_in(trainer: Any) -> tuple[Any, int | None, TruncationMode]:
    """What the tokens of batches are counted in: data set, longest row, how rows are cut."""
    collator = trainer.data_collator
    # Those of transformers, which have a way of padding, mean the length to pad to.
    pads = hasattr(collator, "padding")
    longest = None if pads else getattr(collator, "max_length", None)
    return trainer.train_dataset, longest, getattr(collator, "truncation_mode", "keep_start")


def _check_arguments(trainer: Any) -> None:
    for name in ("get_train_dataloader", "_get_train_sampler"):
        if getattr(type(trainer), name) is not getattr(Trainer, name):
            raise ValueError(
                f"max_tokens_per_batch chooses the batches, and so does {type(trainer).__name__}, "
                f"which has a {name} of its own; leave it out, sharing serves the trainer's own "
                "batches too"
            )
    args = trainer.args
    sampling = getattr(args, "train_sampling_strategy", _BY_DEFAULT)
    if sampling != _BY_DEFAULT or getattr(args, "group_by_length", False):
        raise ValueError(
            f"max_tokens_per_batch chooses the batches, and so does the trainer's "
            f"train_sampling_strategy={sampling!r} or group_by_length; use one of them"
        )
    if args.auto_find_batch_size or args.n_gpu > 1:
        raise ValueError(
            "max_tokens_per_batch sizes the batch of one device, which auto_find_batch_size would "
            "halve and DataParallel (several devices in one process) would split; switch the first "
            "off, and launch a process a device"
        )
    if trainer.accelerator.dispatch_batches or trainer.accelerator.split_batches:
        raise ValueError(
            "max_tokens_per_batch makes batches of different sizes, which accelerate's "
            "dispatch_batches and split_batches cannot deal out; switch them off in "
            "accelerator_config"
        )
    if trainer.train_dataset is None:
        raise ValueError("max_tokens_per_batch needs a trainer with a train_dataset; give it one")
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    images = [name for name in IMAGES if name in columns]
    if images:
        raise ValueError(
            f"max_tokens_per_batch counts the tokens of text, and the train_dataset has {images}; "
            "leave it out, images are shared in the trainer's own batches"
        )


def _check_sampler_options(options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(PrefixSharingBatchSampler).parameters
    known = sorted(parameters.keys() - {"data", "max_tokens", "num_replicas", "rank"})
    unknown = sorted(map(str, options.keys() - set(known)))
    if unknown:
        raise ValueError(
            f"sampler_options has {unknown}, but in a trainer may have some of {known}; leave the "
            "others out: max_tokens is max_tokens_per_batch, and ranks are dealt out by accelerate"
        )


def _packed_tokens(batch: Mapping[str, Any], names: list[str]) -> int:
    trees = [batch[name].prefix_tree for name in names]
    return sum(tree.packed_tokens for tree in trees if tree is not None)
