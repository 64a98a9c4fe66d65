"""The trainer form: which models a trainer holds, and what changes in it beside them."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.collator import DataCollatorWithPrefixSharing
from hf_prefix_patch.groups import GroupedMicroBatches, grouping_advice
from hf_prefix_patch.hooks import OnBypass, is_shared
from hf_prefix_patch.notices import warn_caller
from hf_prefix_patch.support import REFUSED
from hf_prefix_patch.versions import check_loaded
from hf_prefix_patch.wrappers import backbone_of, unwrap

if TYPE_CHECKING:
    from hf_prefix_patch.budget import TokenBudget
    from hf_prefix_patch.patch import PrefixSharing

_STATE = "_prefix_sharing"


def is_trainer(target: Any) -> bool:
    """Whether `target` is a `transformers.Trainer`; never imports the trainer module itself."""
    module = sys.modules.get("transformers.trainer")
    return module is not None and isinstance(target, module.Trainer)


def other_models_of(
    trainer: Any, policy: PreTrainedModel | None
) -> Iterator[tuple[str, nn.Module]]:
    """The models that a trainer holds beside its policy, and where: a reference model, a teacher,
    models among the reward functions. Each decoder stack comes once, in its wrappers; without a
    trainer, none."""
    seen = set() if policy is None else {id(backbone_of(policy))}
    for name, module in [] if trainer is None else _modules_of(trainer):
        try:
            model = unwrap(module, check=False, within=False)
        except TypeError:  # a module of the user's own, which may use its model in any way
            continue
        stack = id(backbone_of(model))
        if stack not in seen:
            seen.add(stack)
            yield name, module


def _modules_of(trainer: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, value in vars(trainer).items():
        if isinstance(value, nn.Module):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from (
                (f"{name}[{i}]", x) for i, x in enumerate(value) if isinstance(x, nn.Module)
            )


def autocast_of(trainer: Any, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast that the trainer runs its models under, for a model on `device`."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    # Not the trainer's arguments: a launcher may have said so instead.
    dtype = dtypes.get(trainer.accelerator.mixed_precision)
    if dtype is None or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def check_trainer(trainer: Any, keep_groups: bool) -> None:
    """Refuse or point out trainer options that do not go with sharing.

    Raises:
        ImportError: a TRL that is too old.
        ValueError: a collator that the trainer cannot use.
        NotImplementedError: NEFTune, whose noise depends on the row length.
    """
    if any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__):
        check_loaded("trl")
    collator = trainer.data_collator
    wanted = _wants_other_batches(trainer)
    if wanted is not None and isinstance(collator, DataCollatorWithPrefixSharing):
        raise ValueError(
            f"the data_collator of this {type(trainer).__name__} is a "
            "DataCollatorWithPrefixSharing, which makes the batches of TRL's DPO since 0.29, but "
            f"the trainer {wanted}; leave data_collator out"
        )
    if type(trainer).__module__.startswith("trl.") and getattr(collator, "layout", "") == "packed":
        raise ValueError(
            f"the data_collator of this {type(trainer).__name__} has layout='packed', but TRL "
            "computes losses from rows; use layout='rows', and max_tokens_per_batch for batches by "
            "token budget"
        )
    args = trainer.args
    if getattr(args, "neftune_noise_alpha", None) is not None:
        raise NotImplementedError(
            f"{REFUSED}the trainer sets neftune_noise_alpha={args.neftune_noise_alpha}, noise "
            "whose size depends on the row length; sharing needs equal tokens to be embedded "
            "alike; set it to None"
        )
    if (
        getattr(args, "precompute_ref_log_probs", False)
        and _has_reference_logps(trainer)
        and not _reference_is_patched(trainer)
    ):
        warnings.warn(
            "precompute_ref_log_probs=True computed the reference log-probs while the trainer was "
            "built, before sharing was enabled; to share that pass too, call "
            "enable_prefix_sharing(model) before building the trainer",
            stacklevel=3,
        )
    advice = None if keep_groups else grouping_advice(trainer)
    if advice is not None:
        warnings.warn(f"prefix sharing: {advice}", stacklevel=3)


def _wants_other_batches(trainer: Any) -> str | None:
    """What a trainer of preferences does with other batches than those of our collator; None for
    one that takes them."""
    if hasattr(trainer, "concatenated_inputs"):  # DPO of TRL before 0.29, ORPO, CPO
        return "joins prompts and completions to rows itself"
    classes = (cls for cls in type(trainer).__mro__ if cls.__module__.startswith("trl."))
    if any(cls.__name__ == "RewardTrainer" for cls in classes):
        return "takes margins, and hands completion_mask to the model"
    return None


def _has_reference_logps(trainer: Any) -> bool:
    """Whether the trainer has them; some compute them when training begins."""
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    return any(re.fullmatch(r"ref.*logps", name) for name in columns)


def _reference_is_patched(trainer: Any) -> bool:
    """Whether the model that computes the reference log-probs was enabled before the trainer."""
    reference = getattr(trainer, "ref_model", None)
    reference = trainer.model if reference is None else reference
    return is_shared(reference)


class TrainerPatch:
    """What sharing changes in a trainer beside its models; undone by `remove`.

    - `data_collator` makes batches that carry their plan.
    - Callbacks look, when training begins, whether the model is shared, and whether the batches are
      those that a checkpoint was made with.
    - With `log_metrics`, sharing metrics join what is logged.
    - With `max_tokens`, training batches are made by token budget.
    - With `keep_groups`, completions of one prompt come in one micro-batch.
    """

    def __init__(
        self,
        trainer: Any,
        handle: PrefixSharing,
        on_bypass: OnBypass,
        log_metrics: bool,
        max_tokens: int | None,
        sampler_options: Mapping[str, Any],
        keep_groups: bool = False,
    ) -> None:
        # Here as in budget: it needs accelerate, which models and loops of one's own do not.
        from hf_prefix_patch.callbacks import CheckPolicy, MetricsLog, ResumedBatches

        self._before = before = trainer_patch_of(trainer)
        if before is not None:
            before.remove()
        self.trainer = trainer
        self.budget: TokenBudget | None = None
        try:
            grouped = GroupedMicroBatches(trainer) if keep_groups else None
            if max_tokens is not None:
                from hf_prefix_patch.budget import TokenBudget

                self.budget = TokenBudget(trainer, max_tokens, sampler_options)
            planning = DataCollatorWithPrefixSharing.wrap(trainer.data_collator)
            self._new: list[tuple[Any, str, Any]] = [(trainer, "data_collator", planning)]
            self._callbacks: list[Any] = [
                CheckPolicy(on_bypass, self.budget is not None),
                ResumedBatches(self.budget),
            ]
            if log_metrics:
                metrics = MetricsLog(trainer, handle)
                self._new.append((trainer, "log", metrics.log))
                self._callbacks.append(metrics)
            if self.budget is not None:
                self._new += self.budget.overrides
                self._callbacks.append(self.budget.callback)
            if grouped is not None:
                self._new.append((trainer, "_prepare_inputs", grouped))
            self.apply()
        except BaseException:
            if before is not None:
                before.apply()
            raise

    def apply(self) -> None:
        self._old = {
            (id(owner), name): owner.__dict__[name]
            for owner, name, _ in self._new
            if name in owner.__dict__
        }
        self.trainer.__dict__[_STATE] = self  # first: it is what undoes the rest
        try:
            for owner, name, value in self._new:
                owner.__dict__[name] = value
            for callback in self._callbacks:
                self.trainer.add_callback(callback)
            self._put_in_force(True)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put everything back but what others have set since; removing twice is fine."""
        if trainer_patch_of(self.trainer) is not self:
            return
        for owner, name, ours in self._new:
            if owner.__dict__.get(name) is not ours:
                continue
            del owner.__dict__[name]
            if (id(owner), name) in self._old:
                owner.__dict__[name] = self._old[id(owner), name]
        # Another list: a callback may be the one that removes sharing, while the old one is read.
        handler, ours_too = self.trainer.callback_handler, set(map(id, self._callbacks))
        handler.callbacks = [x for x in handler.callbacks if id(x) not in ours_too]
        self._put_in_force(False)
        del self.trainer.__dict__[_STATE]

    def _put_in_force(self, value: bool) -> None:
        if self.budget is not None:
            self.budget.in_force = value

    def say_if_training(self) -> None:
        """The data loader of a run that has begun goes on dealing out batches by token budget."""
        if self.budget is not None and self.budget.has_dealt and _is_training(self.trainer):
            warn_caller(
                "prefix sharing was removed from a trainer that is training: until this run ends "
                "its batches are those of max_tokens_per_batch, which may need several times their "
                "memory now, and pairs of small batches weigh more; call train() again, or remove "
                "sharing when it is over"
            )

    def give_back(self) -> None:
        """Remove this patch, and bring back the one that it took the place of."""
        if trainer_patch_of(self.trainer) is self:
            self.remove()
            if self._before is not None:
                self._before.apply()


def clear_trainer(trainer: Any) -> None:
    """Leave nothing of sharing in a trainer, whoever enabled it."""
    patch = trainer_patch_of(trainer)
    if patch is not None:
        patch.remove()
        patch.say_if_training()


def _is_training(trainer: Any) -> bool:
    """Whether the caller is inside of `trainer.train()`; its own flag stays after an error."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "train" and frame.f_locals.get("self") is trainer:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def trainer_patch_of(trainer: Any) -> TrainerPatch | None:
    """The patch that a trainer carries, if any."""
    patch: TrainerPatch | None = trainer.__dict__.get(_STATE)
    return patch
