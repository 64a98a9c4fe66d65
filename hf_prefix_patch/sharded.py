"""Weights that are sharded between calls: in place for calls that no training step is around."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

# Attributes of parameters that DeepSpeed ZeRO-3, DTensor and FSDP 1 have split over processes.
_MARKS = ("ds_id", "device_mesh", "_fsdp_flattened")


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of `module` are split over processes."""
    return any(hasattr(p, mark) for p in module.parameters() for mark in _MARKS)


@contextmanager
def whole_weights(called: nn.Module) -> Iterator[None]:
    """Let `called` run forward, whatever shards its weights, and leave them sharded.

    Collectives are as in any forward: every process has to make the same calls.
    """
    with ExitStack() as stack:
        for hook in _gather_from_deepspeed(called):
            stack.callback(hook.remove)
        stack.callback(_shard_again, called)
        yield


def _gather_from_deepspeed(called: nn.Module) -> list[Any]:
    """Hooks that gather ZeRO-3's weights where no engine does, module by module.

    Models loaded under its config are partitioned long before a trainer makes the engine.
    """
    zero: Any = sys.modules.get("deepspeed.runtime.zero")
    if zero is None:
        return []
    open_: dict[nn.Module, list[Any]] = {}

    def before(module: nn.Module, args: Any) -> None:
        mine = list(module.parameters(recurse=False))
        missing = [p for p in mine if p.numel() == 0 and getattr(p, "ds_numel", False)]
        gathering = zero.GatheredParameters(missing)
        gathering.__enter__()
        open_.setdefault(module, []).append(gathering)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        open_[module].pop().__exit__(None, None, None)

    hooks: list[Any] = []
    for module in called.modules():
        if module._parameters:
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(after, always_call=True))
    return hooks


def _shard_again(called: nn.Module) -> None:
    """Of FSDP, which keeps the weights of a root after its forward for the backward to come.

    An optimizer made now would be given the gathered weights of FSDP2; FSDP1 would take no notice
    of weights that are loaded now.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in called.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
        elif isinstance(module, fsdp.FullyShardedDataParallel):
            handle = module._handle  # None if units within have all of its weights
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                handle.reshard(True)
