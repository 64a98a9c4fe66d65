"""What the launcher does with models that are loaded and trainers that are built."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.hooks import BackbonePatch, OnBypass, patch_of, patched_stacks
from hf_prefix_patch.notices import warn_caller
from hf_prefix_patch.patch import check_options, disable_prefix_sharing, enable_prefix_sharing
from hf_prefix_patch.sharded import is_sharded
from hf_prefix_patch.support import REFUSED
from hf_prefix_patch.switch import LaunchOptions
from hf_prefix_patch.trainer import other_models_of
from hf_prefix_patch.wrappers import backbone_of, device_of, unwrap

# What `enable_prefix_sharing` raises for a model that cannot be shared.
_REFUSALS = (NotImplementedError, RuntimeError, TypeError)
# Why a model is not verified: as `_unverified` takes it.
_ON_META = "its weights are on the meta device"
_GATHERED = "its weights are sharded, and it is called by what gathers them"


@dataclass
class _Seen:
    """One line of the summary: a model, its patch if it has one, or why it has none."""

    name: str
    patch: BackbonePatch | None
    remark: str = ""


class Launch:
    """Enables models and trainers of this process, and says at its end what came of it.

    Args:
        options: of the launcher.

    Raises:
        ValueError: an unknown backend or option.
    """

    def __init__(self, options: LaunchOptions) -> None:
        check_options(options.backend, options.on_bypass)
        self.options = options
        self._seen: list[_Seen] = []  # never the models themselves, which may be freed before
        self._process = os.getpid()
        atexit.register(self.report)

    def loaded(self, model: Any) -> None:
        """Enable a model that `from_pretrained` returned, where it can be shared.

        It is verified before its first call. By then its weights are where they will be used; here
        they may be absent still, or on the CPU although there is an accelerator. For the same
        reason a backend that is named is not asked for here.
        """
        if not isinstance(model, PreTrainedModel) or patch_of(backbone_of(model)) is not None:
            return
        try:
            enable_prefix_sharing(model, verify=False, on_bypass=self._on_bypass)
        except _REFUSALS as refusal:
            self._leave(_name_of(model), refusal)
            return
        backbone = backbone_of(model)
        patch = patch_of(backbone)
        assert patch is not None
        patch.backend = self.options.backend
        if self.options.verify:
            patch.before_first_call = verify_before_first_call
        self._seen.append(_Seen(_name_of(model), patch))

    def constructed(self, trainer: Any) -> None:
        """Enable a trainer: its models, its data collator and what the options ask for.

        Raises:
            NotImplementedError, RuntimeError, TypeError: as `enable_prefix_sharing`, unless
                `on_refusal` is `"warn"`.
            ValueError: the trainer cannot take the options.
        """
        options, roles = self.options, _roles(trainer)
        name = type(trainer).__name__
        on_meta = any(device_of(backbone).type == "meta" for backbone, _ in roles)
        try:
            handle = enable_prefix_sharing(
                trainer,
                backend=options.backend,
                verify=options.verify and not on_meta,
                on_bypass=self._on_bypass,
                log_metrics=options.log_metrics,
                max_tokens_per_batch=options.max_tokens_per_batch,
                sampler_options=options.sampler_options,
                keep_groups=options.keep_groups,
            )
        except _REFUSALS as refusal:
            if options.on_refusal == "raise":
                refusal.add_note(
                    f"hf_prefix_patch was launched with on_refusal='raise'; 'warn' lets {name} "
                    "train without sharing"
                )
                raise
            for backbone in [*patched_stacks(trainer.model), *(stack for stack, _ in roles)]:
                disable_prefix_sharing(backbone)
            self._leave(name, refusal)
            return
        for backbone in handle.backbones:
            role = next((role for other, role in roles if other is backbone), "another model")
            self._note(backbone, f"{role} of {name}")
        if options.verify and on_meta:
            warnings.warn(_unverified(name, _ON_META), stacklevel=3)

    def sharded(self, model: nn.Module, by_module: bool) -> None:
        """Verify what waits for it in a model whose weights were sharded, before a step is taken.

        Args:
            model: as it will be called.
            by_module: whether each module gathers its own weights; if not, `model` has to be called
                for that.
        """
        for backbone in patched_stacks(model):
            patch = patch_of(backbone)
            waits = patch is not None and patch.before_first_call is verify_before_first_call
            if waits and is_sharded(backbone):
                _verify(backbone, backbone if by_module else model)

    @property
    def _on_bypass(self) -> OnBypass:
        return cast(OnBypass, self.options.on_bypass)

    def _note(self, backbone: PreTrainedModel, remark: str) -> None:
        patch = patch_of(backbone)
        seen = next((seen for seen in self._seen if seen.patch is patch), None)
        if seen is None:
            seen = _Seen(_name_of(backbone), patch)
            self._seen.append(seen)
        seen.remark = remark

    def _leave(self, name: str, refusal: Exception) -> None:
        reason = str(refusal).removeprefix(REFUSED)
        self._seen.append(_Seen(name, None, reason))
        warnings.warn(f"{name} runs without prefix sharing: {reason}", stacklevel=4)

    def off(self) -> None:
        """Say nothing at the end of the process."""
        atexit.unregister(self.report)

    def report(self) -> None:
        """Print a line for each model to stderr, on the first process only."""
        if os.getpid() != self._process or rank() != 0:
            return
        size = int(os.environ.get("WORLD_SIZE") or 1)
        where = f" (first of {size} processes)" if size > 1 else ""
        for seen in self._seen:
            print(f"prefix sharing{where}: {_line(seen)}", file=sys.stderr)


def rank() -> int:
    """Of this process in its group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK") or 0)


def verify_before_first_call(backbone: PreTrainedModel) -> None:
    """Takes the patch off if its results are wrong."""
    on_meta = device_of(backbone).type == "meta"
    if on_meta or is_sharded(backbone):
        absent = _ON_META if on_meta else _GATHERED
        warn_caller(_unverified(type(backbone).__name__, absent))
    else:
        _verify(backbone, backbone)


def _verify(backbone: PreTrainedModel, called: nn.Module) -> None:
    """Through `called`, which is the stack itself or holds it."""
    patch, name = patch_of(backbone), type(backbone).__name__
    assert patch is not None
    cache_by_default = patch.cache_by_default  # the head is not seen from the stack
    try:
        enable_prefix_sharing(called, backend=patch.backend, on_bypass=patch.on_bypass)
        patch.cache_by_default = cache_by_default
    except (*_REFUSALS, ValueError) as refusal:  # the last of models that are NaN
        patch.stats.bypassed[str(refusal)] += 1
        disable_prefix_sharing(backbone)
        warn_caller(f"{name} runs without prefix sharing: {refusal}")


def _roles(trainer: Any) -> list[tuple[PreTrainedModel, str]]:
    """Decoder stacks of a trainer's models; none for a model that is not of transformers."""
    found, policy = [], None
    try:
        policy = unwrap(trainer.model, check=False)
        found.append((backbone_of(policy), "policy"))
    except TypeError:
        pass
    for name, module in other_models_of(trainer, policy):
        role = "reference" if name == "ref_model" else name
        found.append((backbone_of(unwrap(module, check=False)), role))
    return found


def _unverified(name: str, absent: str) -> str:
    return (
        f"prefix sharing of {name} was not verified: {absent}; verify a smaller model of the same "
        "family, or switch verification off to do without this warning"
    )


def _name_of(model: PreTrainedModel) -> str:
    source = getattr(model.config, "name_or_path", "")
    return f"{type(model).__name__} from {source!r}" if source else type(model).__name__


def _line(seen: _Seen) -> str:
    if seen.patch is None:
        return f"{seen.name}: not shared: {seen.remark}"
    stats, remark = seen.patch.stats, f" ({seen.remark})" if seen.remark else ""
    if not stats.calls and not stats.bypassed:
        return f"{seen.name}{remark}: not called while sharing was enabled"
    return f"{seen.name}{remark}: {stats}"
