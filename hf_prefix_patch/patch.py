"""`enable_prefix_sharing`, `disable_prefix_sharing` and the handle."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial, reduce
from operator import add
from types import TracebackType
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.attach import Shared, share_model
from hf_prefix_patch.attention import BACKENDS
from hf_prefix_patch.hooks import OnBypass, Options, patch_of, patched_stacks, unpatch
from hf_prefix_patch.options import check_counts, check_switches
from hf_prefix_patch.sampler import PrefixSharingBatchSampler
from hf_prefix_patch.selection import Selection
from hf_prefix_patch.stats import SharingStats
from hf_prefix_patch.trainer import (
    TrainerPatch,
    check_trainer,
    clear_trainer,
    is_trainer,
    other_models_of,
)
from hf_prefix_patch.wrappers import unwrap


class PrefixSharing:
    """Handle on one or more patched decoder stacks; made by `enable_prefix_sharing`.

    As a context manager it removes the patch on exit. Of a model that was shared already, it brings
    back the options that it found, those of its trainer as well, and sharing goes on. It keeps no
    model and no trainer alive.
    """

    def __init__(self, shared: list[Shared]) -> None:
        self._backbones = [weakref.ref(x.backbone) for x in shared]
        self._found = [x.found for x in shared]
        self._patches = [patch for patch in map(patch_of, self.backbones) if patch is not None]
        self._trainer_patch: weakref.ref[TrainerPatch] | None = None
        self._sampler: PrefixSharingBatchSampler | None = None

    @property
    def backbones(self) -> list[PreTrainedModel]:
        """The patched decoder stacks that are still there; that of the (policy) model is the
        first."""
        return [stack for stack in (ref() for ref in self._backbones) if stack is not None]

    @property
    def stats(self) -> SharingStats:
        """Counters; for a trainer, policy and reference model together."""
        stats = [patch.stats for patch in self._patches]
        return stats[0] if len(stats) == 1 else reduce(add, stats)

    @property
    def backend(self) -> str:
        """Name of the attention backend that served the last shared call of the (policy) model,
        that of the verification included; before any, of the one for its device and dtype."""
        return self._selection().backend.name

    @property
    def passed_over(self) -> dict[str, str]:
        """By name, why each other backend is not the one in use."""
        return dict(self._selection().passed_over)

    @property
    def sampler(self) -> PrefixSharingBatchSampler | None:
        """What makes the trainer's batches, with `max_tokens_per_batch`; like `stats`, it can be
        read when sharing is over."""
        return self._sampler

    def _selection(self) -> Selection:
        patch = self._patches[0]
        return patch.last or patch.selection(self.backbones[0])

    def remove(self) -> None:
        """Undo the patch; nothing of it is left, whoever enabled it. Removing twice is fine."""
        self._undo([None for _ in self._backbones])

    def _undo(self, found: list[Options | None]) -> None:
        on_trainer = None if self._trainer_patch is None else self._trainer_patch()
        if on_trainer is not None:
            self._undo_trainer(on_trainer, found[0] is not None)
        self._trainer_patch = None
        for ref, patch, options in zip(self._backbones, self._patches, found, strict=True):
            backbone = ref()
            if backbone is None or patch_of(backbone) is not patch:
                continue
            if options is None:
                patch.remove(backbone)
            else:
                patch.configure(*options)

    def _undo_trainer(self, on_trainer: TrainerPatch, shared_before: bool) -> None:
        policy = self._backbones[0]()
        if shared_before:
            on_trainer.give_back()
        elif policy is not None and patch_of(policy) is self._patches[0]:
            clear_trainer(on_trainer.trainer)
        else:  # a newer patch is none of its concern
            on_trainer.remove()

    def __enter__(self) -> PrefixSharing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo(self._found)

    def __repr__(self) -> str:
        state = "active" if any(map(patch_of, self.backbones)) else "removed"
        return f"PrefixSharing({state}, backend={self._patches[0].backend!r}, stats={self.stats!r})"


def enable_prefix_sharing(
    target: Any,
    *,
    backend: str = "auto",
    verify: bool = True,
    on_bypass: OnBypass = "warn",
    log_metrics: bool = False,
    max_tokens_per_batch: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    keep_groups: bool = False,
) -> PrefixSharing:
    """Make a model compute what the rows of a batch share once.

    Every later call of the model's decoder stack with a batch of rows runs on one packed row; all
    that the rest of the program sees is what the unpatched model returns, up to float rounding,
    gradients included. Enabling twice is the same as once; the options of the later call apply.

    Args:
        target: a `PreTrainedModel`, a PEFT, DDP, FSDP or compiled wrapper of one, a module of
            your own that holds one, or a `transformers.Trainer` (any TRL trainer): then its model
            and the models that it holds beside it (reference, teacher, reward models), and its data
            collator plans the batches that it makes.
        backend: `"auto"`, which picks at every call by device, dtype and what the model's
            attention needs, or the name of one: `"torch_varlen"`, `"flash"`, `"sdpa"`, `"flex"`.
        verify: run a small random batch shared and unshared through `target` as it is called (of a
            module of your own, through the model in it), and compare (for a trainer, under its
            autocast); on a mismatch the model is restored and the call raises. No gradient and no
            random state is touched. Where weights are sharded, all processes must enable alike.
        on_bypass: what a training call that cannot be shared does beside running unshared and being
            counted: `"warn"` once a reason, `"ignore"`, or `"raise"` a RuntimeError; so does a
            call outside training that is not shared for want of `use_cache=False`, and a model
            beside a trainer's policy that cannot be shared. Batches with nothing to gain are
            counted only.
        log_metrics: trainers only: add `prefix_sharing/sharing_ratio` and
            `prefix_sharing/packed_tokens` to what the trainer logs.
        max_tokens_per_batch: trainers only: training batches of at most so many unique tokens on
            each device, the tokens that the decoder runs on, in which pairs that share text come
            together; takes the place of `per_device_train_batch_size`. Every pair has the same
            weight in the gradient, as with fixed batches of the mean size. It does not bound what
            is computed from rows after the decoder, such as TRL's logits where there is no CUDA.
        sampler_options: further arguments of `PrefixSharingBatchSampler` for that, such as
            `longest_first`, `max_pairs_per_prompt` or `oversized`.
        keep_groups: trainers that generate several completions of a prompt (GRPO, RLOO) only: deal
            out those of one prompt together, where the trainer scatters them over the micro-batches
            of an optimizer step. Each step has the rows that it had.

    Returns:
        The handle: a context manager with `.remove()`, `.stats`, `.backend`, `.passed_over` and
        `.sampler`.

    Raises:
        TypeError: `target` holds no `PreTrainedModel`, or an option is of another type.
        ValueError: an unknown backend or option, an option for trainers without one, a pair that
            exceeds `max_tokens_per_batch`, or `keep_groups` where there is nothing to keep.
        NotImplementedError: a model, an adapter or a trainer option that cannot be shared exactly,
            or a named backend that cannot serve this model where it is.
        RuntimeError: the verification found a difference or could not look for one, the backend's
            kernel computes wrong results on this device, or a text decoder would be patched by
            itself and with the composite around it.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> model = LlamaForCausalLM(config)
        >>> with enable_prefix_sharing(model) as sharing:
        ...     rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])  # one prompt, two answers
        ...     logits = model(input_ids=rows).logits
        >>> logits.shape, sharing.stats.padded_tokens, sharing.stats.packed_tokens
        (torch.Size([2, 4, 64]), 8, 5)
    """
    check_options(backend, on_bypass)
    check_switches(verify=verify)
    _check_trainer_options(
        target,
        log_metrics=log_metrics,
        max_tokens_per_batch=max_tokens_per_batch,
        sampler_options=sampler_options,
        keep_groups=keep_groups,
    )
    trainer = target if is_trainer(target) else None
    policy = target if trainer is None else trainer.model
    if trainer is not None:
        check_trainer(trainer, keep_groups)
    with ExitStack() as undo:
        share = partial(share_model, trainer, backend, on_bypass, verify, undo)
        shared = [share(policy)]
        for name, module in other_models_of(trainer, unwrap(policy)):
            try:
                shared.append(share(module, is_policy=False))
            except RuntimeError as refusal:  # NotImplementedError is one
                if on_bypass == "raise":
                    raise
                disable_prefix_sharing(module)  # enabled before, perhaps without verification
                if on_bypass == "warn":
                    warnings.warn(
                        f"prefix sharing: {name} of the trainer runs as it is: {refusal}",
                        stacklevel=2,
                    )
        handle = PrefixSharing(shared)
        if trainer is not None:
            on_trainer = TrainerPatch(
                trainer,
                handle,
                on_bypass,
                log_metrics,
                max_tokens_per_batch,
                sampler_options or {},
                keep_groups,
            )
            handle._trainer_patch = weakref.ref(on_trainer)
            if on_trainer.budget is not None:
                handle._sampler = on_trainer.budget.sampler
        undo.pop_all()
    return handle


def check_options(backend: str, on_bypass: str) -> None:
    """Refuse values that no model takes.

    Raises:
        ValueError: an unknown backend, or an unknown thing to do about bypassed calls.
    """
    names = ["auto", *sorted(BACKENDS)]
    if backend not in names:
        raise ValueError(
            f"backend is {backend!r}, but must be one of {names}; leave it out for 'auto'"
        )
    if on_bypass not in get_args(OnBypass):
        raise ValueError(
            f"on_bypass is {on_bypass!r}, but must be one of {get_args(OnBypass)}; leave it out "
            "for 'warn'"
        )


def _check_trainer_options(target: Any, **options: Any) -> None:
    check_switches(log_metrics=options["log_metrics"], keep_groups=options["keep_groups"])
    check_counts(max_tokens_per_batch=options["max_tokens_per_batch"])
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given and not is_trainer(target):
        raise ValueError(
            f"{given[0]}={options[given[0]]!r} needs a trainer, but target is a "
            f"{type(target).__name__}; pass the trainer, or in a loop of your own read "
            "handle.stats and use PrefixSharingBatchSampler"
        )
    if "sampler_options" in given and "max_tokens_per_batch" not in given:
        raise ValueError(
            f"sampler_options={options['sampler_options']!r} need max_tokens_per_batch, whose "
            "sampler they are for; give that too"
        )
    if not isinstance(options["sampler_options"], Mapping | None):
        raise TypeError(
            f"sampler_options is {options['sampler_options']!r}, but must be a mapping of "
            'arguments of PrefixSharingBatchSampler; pass such as {"oversized": "skip"}'
        )


def disable_prefix_sharing(target: Any) -> None:
    """Undo `enable_prefix_sharing` without its handle; fine on a target that is not patched.

    Args:
        target: what `enable_prefix_sharing` takes.

    Raises:
        TypeError: `target` holds no `PreTrainedModel`.
    """
    trainer = target if is_trainer(target) else None
    policy = target if trainer is None else trainer.model
    # What is patched, not what would be: a module may hold another model by now.
    shared = patched_stacks(policy) if isinstance(policy, nn.Module) else []
    if not shared:
        unwrap(policy, check=False)
    for _, module in other_models_of(trainer, None):
        shared += patched_stacks(module)
    for backbone in shared:  # one may come twice
        unpatch(backbone)
    if trainer is not None:
        clear_trainer(trainer)
