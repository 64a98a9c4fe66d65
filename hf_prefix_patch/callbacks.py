"""What a patched trainer is told in the course of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_prefix_patch.hooks import OnBypass, patch_of, patched_stacks
from hf_prefix_patch.notices import warn_caller

if TYPE_CHECKING:
    from hf_prefix_patch.budget import TokenBudget
    from hf_prefix_patch.patch import PrefixSharing
    from hf_prefix_patch.sampler import PrefixSharingBatchSampler


class SetEpoch(TrainerCallback):
    """Tells the sampler the epoch, through whatever wraps it on several processes or in a resumed
    run."""

    def __init__(self, sampler: PrefixSharingBatchSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A finished epoch may be counted a rounding error short of a whole number.
        self._sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class ResumedBatches(TrainerCallback):
    """Says so when a run goes on from a checkpoint that was made with other batches: the trainer
    skips as many of those that it makes now as were trained then.

    What batches are made by is kept in the trainer's state, which its checkpoints hold.

    Args:
        budget: of the trainer's batches; None for its own.
    """

    _NAME = "prefix_sharing_batches"

    def __init__(self, budget: TokenBudget | None) -> None:
        self._budget = budget

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = {} if self._budget is None else self._budget.settings
        then = state.stateful_callbacks.pop(self._NAME, {})
        if now:
            state.stateful_callbacks[self._NAME] = now
        if state.global_step and now != then and not args.ignore_data_skip:
            warn_caller(
                f"prefix sharing: the checkpoint was made with {then or 'fixed batches'}, and the "
                f"run goes on with {now or 'fixed batches'}: the trainer skips as many batches as "
                "were trained, so that some pairs come twice and others never; give the same "
                "data, max_tokens_per_batch and sampler_options, or set ignore_data_skip=True to "
                "begin the epoch anew"
            )


class MetricsLog(TrainerCallback):
    """A trainer's `log` with sharing metrics, of training and of evaluation apart, each over the
    calls since it was logged last. What no log is of, such as a prediction, is in none.

    `prefix_sharing/sharing_ratio` is real row tokens per packed token,
    `prefix_sharing/packed_tokens` the tokens that the decoder ran on. In evaluation the names
    begin with `eval_`, as those of TRL do.
    """

    def __init__(self, trainer: Any, handle: PrefixSharing) -> None:
        self._trainer, self._handle, self._log = trainer, handle, trainer.log
        self._seen, self._trained = self._count(), (0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since_last()  # a reference that was precomputed

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self._since_last()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows, packed = self._since_last()
        self._trained = (self._trained[0] + rows, self._trained[1] + packed)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        training = self._trainer.model.training
        rows, packed = self._since_last()
        if training:
            rows, packed = rows + self._trained[0], packed + self._trained[1]
            self._trained = (0, 0)
        if packed:
            prefix = "" if training else "eval_"
            logs[f"{prefix}prefix_sharing/sharing_ratio"] = rows / packed
            logs[f"{prefix}prefix_sharing/packed_tokens"] = packed
        self._log(logs, *args, **kwargs)

    def _since_last(self) -> tuple[int, int]:
        before, self._seen = self._seen, self._count()
        return self._seen[0] - before[0], self._seen[1] - before[1]

    def _count(self) -> tuple[int, int]:
        stats = self._handle.stats
        return stats.row_tokens, stats.packed_tokens


class CheckPolicy(TrainerCallback):
    """Says so when the model that is about to be trained is not shared, though the trainer is
    patched: its batches may hold several times the tokens that it then runs on. And after a step in
    which its decoder stack was not called.

    Args:
        on_bypass: as `enable_prefix_sharing`.
        by_budget: whether batches are made by token budget; without sharing they may need more
            memory than there is, so that training does not begin.
    """

    def __init__(self, on_bypass: OnBypass, by_budget: bool) -> None:
        self._on_bypass, self._by_budget = on_bypass, by_budget
        self._has_stepped = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._check(model)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self._by_budget:  # the batches stay those of the budget until training ends
            self._check(model)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self._has_stepped:
            return
        self._has_stepped = True
        patches = [patch for patch in map(patch_of, patched_stacks(model)) if patch is not None]
        if patches and not any(x.stats.calls or x.stats.bypassed for x in patches):
            self._say(
                f"the decoder stack of the {type(model).__name__} that this trainer trains was not "
                "called in its first step, so nothing is shared; where a module of your own calls "
                "its forward or its layers, call the stack itself"
            )

    def _check(self, model: Any) -> None:
        if patched_stacks(model):
            return
        message = (
            f"the {type(model).__name__} that this trainer trains is not shared: sharing was "
            "removed from it, or it took the place of the model that was enabled, as what "
            "model_init builds does; call enable_prefix_sharing on the trainer again or, with "
            "model_init, on the model in there, or else disable_prefix_sharing on the trainer"
        )
        if self._by_budget:
            raise RuntimeError(f"{message}. Its batches are made by max_tokens_per_batch")
        self._say(message)

    def _say(self, message: str) -> None:
        if self._on_bypass == "raise":
            raise RuntimeError(message)
        if self._on_bypass == "warn":
            warn_caller(f"prefix sharing: {message}")
