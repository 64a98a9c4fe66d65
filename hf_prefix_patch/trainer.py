"""The trainer form: which models a trainer holds, and sharing metrics in its log."""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_prefix_patch.patch import PrefixSharing


def is_trainer(target: Any) -> bool:
    """Whether `target` is a `transformers.Trainer`; never imports the trainer module itself."""
    module = sys.modules.get("transformers.trainer")
    return module is not None and isinstance(target, module.Trainer)


def models_of(trainer: Any) -> list[Any]:
    """The policy and, where the trainer keeps one, the reference model."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    return [model for model in models if model is not None]


def autocast_of(trainer: Any, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast that the trainer runs its models under, for a model on `device`."""
    bf16, fp16 = (getattr(trainer.args, name, False) for name in ("bf16", "fp16"))
    if not (bf16 or fp16) or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if bf16 else torch.float16)


def check_trainer(trainer: Any) -> None:
    """Refuse or point out trainer options that do not go with sharing.

    Raises:
        NotImplementedError: NEFTune, whose noise depends on the row length.
    """
    args = trainer.args
    if getattr(args, "neftune_noise_alpha", None) is not None:
        raise NotImplementedError(
            f"prefix sharing refused: the trainer sets neftune_noise_alpha="
            f"{args.neftune_noise_alpha}, noise whose size depends on the row length; set it to "
            "None"
        )
    if getattr(args, "precompute_ref_log_probs", False):
        warnings.warn(
            "precompute_ref_log_probs=True computed the reference log-probs while the trainer was "
            "built, before sharing was enabled; to share that pass too, call "
            "enable_prefix_sharing(model) before building the trainer",
            stacklevel=3,
        )


class MetricsLog:
    """Adds sharing metrics to everything a trainer logs, each over the calls since the last log.

    `prefix_sharing/sharing_ratio` is real row tokens per packed token,
    `prefix_sharing/packed_tokens` the tokens that the decoder ran on. In evaluation the names
    begin with `eval_`, as those of TRL do.
    """

    def __init__(self, trainer: Any, handle: PrefixSharing) -> None:
        self.remove_from(trainer)
        self._trainer, self._handle = trainer, handle
        self._seen = (0, 0)
        self._log, self._was_set = trainer.log, "log" in trainer.__dict__
        trainer.log = self

    def __call__(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        stats = self._handle.stats
        rows, packed = stats.row_tokens - self._seen[0], stats.packed_tokens - self._seen[1]
        if packed:
            self._seen = (stats.row_tokens, stats.packed_tokens)
            prefix = "" if self._trainer.model.training else "eval_"
            logs[f"{prefix}prefix_sharing/sharing_ratio"] = rows / packed
            logs[f"{prefix}prefix_sharing/packed_tokens"] = packed
        self._log(logs, *args, **kwargs)

    def remove(self) -> None:
        self.remove_from(self._trainer)

    @staticmethod
    def remove_from(trainer: Any) -> None:
        ours = trainer.__dict__.get("log")
        if isinstance(ours, MetricsLog):
            del trainer.log
            if ours._was_set:
                trainer.log = ours._log
