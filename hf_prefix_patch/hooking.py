"""What the hooks on modules have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

Hook = TypeVar("Hook", bound=Callable[..., Any])


def untraced(hook: Hook) -> Hook:
    """Keep torch.compile out: the hooks read token ids on the host."""
    return cast(Hook, torch.compiler.disable(hook))  # type: ignore[no-untyped-call]


def by_name(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call of the module."""
    if not args:
        return dict(kwargs)
    names = inspect.signature(module.forward).parameters
    return kwargs | dict(zip(names, args, strict=False))
