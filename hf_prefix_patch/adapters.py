"""PEFT layers in a decoder stack whose results depend on more than single tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

# Methods that mix weights by row, average over the batch, or run the rows a second time.
_BY_BATCH = {"POLY", "XLORA", "LILY", "SHADOW"}
# A variant of LoRA: its backward uses an average of the activations of a batch.
_VELORA = "VeloraLinearVariant"


def config_depends_on_batch(config: Any) -> bool:
    """Whether an adapter with this config treats equal tokens of a batch apart."""
    return config.peft_type in _BY_BATCH or getattr(config, "velora_config", None) is not None


def adapter_reason(backbone: nn.Module) -> str | None:
    """Why PEFT would treat equal tokens of this call apart; None if it does not.

    PEFT takes a choice by row (`adapter_names`, the offsets of aLoRA, the task of Poly) out of the
    arguments before the decoder stack sees them, and hands it to its layers by hooks that live as
    long as the call.
    """
    if "peft.tuners.tuners_utils" not in sys.modules:
        return None
    for module in _down_to_adapters(backbone):
        before, after = module._forward_pre_hooks, module._forward_hooks
        if before and any(map(_is_of_peft, before.values())):
            return "adapters chosen by row"
        if after and any(map(_is_of_peft, after.values())):
            return "PEFT reads the activations of rows"
        if _depends_on_batch(module):
            return "an adapter that depends on the batch"
    return None


def _down_to_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below one, without what is inside adapter layers; called once a forward."""
    left = [module]
    while left:
        for child in left.pop()._modules.values():
            if child is not None:
                yield child
                kind: Any = type(child)
                if child._modules and not _is_adapter(kind):
                    left.append(child)


@cache
def _is_adapter(kind: type) -> bool:
    return issubclass(kind, sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer)


def _is_of_peft(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # the hook is a partial, a function or a callable object
    name = getattr(function, "__module__", type(function).__module__)
    return str(name).startswith("peft.")


def _depends_on_batch(module: nn.Module) -> bool:
    variants: dict[str, Any] = module.__dict__.get("lora_variant", {})
    velora = any(type(variant).__name__ == _VELORA for variant in variants.values())
    kind: Any = type(module)
    return velora or _is_by_batch(kind)


@cache
def _is_by_batch(kind: type) -> bool:
    package = kind.__module__
    return package.startswith("peft.tuners.") and package.split(".")[2].upper() in _BY_BATCH
