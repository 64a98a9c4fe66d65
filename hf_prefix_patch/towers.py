"""Vision and audio towers: what a batch holds several times they compute once.

Where the images of a batch repeat, a tower runs on the first of them alone, and what it returns is
repeated. How its output grows with its input is learnt from the first such call, which runs on all
of them and on the first: a tower for which the two do not agree goes on as without sharing.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from hf_prefix_patch.composite import CALL
from hf_prefix_patch.media import ROUNDING, repeats
from hf_prefix_patch.packed import untraced
from hf_prefix_patch.sharded import is_sharded

logger = logging.getLogger(__name__)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_STATE = "_prefix_sharing_tower"
_OPTIONS = (bool, int, float, str, torch.dtype, type(None))


@dataclass
class _Call:
    """A call of a tower on inputs that repeat; `part` is what it returned for the first of them,
    where that is still to be learnt from."""

    times: int
    whole: Arguments
    part: Any = None


class Towers:
    """Those of a composite, and how often the images of its present call repeat."""

    def __init__(self, composite: PreTrainedModel, decoder: PreTrainedModel) -> None:
        children = composite.children() if composite is not decoder else ()
        self._towers = [
            child
            for child in children
            if isinstance(child, PreTrainedModel) and decoder not in child.modules()
        ]
        self._hooks: list[Any] = []
        for tower in self._towers:
            setattr(tower, _STATE, _Tower())
            self._hooks.append(tower.register_forward_pre_hook(take_part, with_kwargs=True))
            register = tower.register_forward_hook
            self._hooks.append(register(repeat, with_kwargs=True, always_call=True))

    def expect(self, times: int) -> None:
        """Of the call that this thread makes: one, unless it is shared."""
        for tower in self._towers:
            tower.__dict__[_STATE].times[get_ident()] = times

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for tower in self._towers:
            delattr(tower, _STATE)


class _Tower:
    """State of one tower; lives on the module.

    Attributes:
        times: how often images repeat in the running call of the composite, by thread.
        calls: those of the tower that are running, by thread.
        dims: of each tensor of the output, the one that grows with the input; None until learnt.
        form: of that output.
        fits: whether its output repeats as its input does, as far as is known.
    """

    def __init__(self) -> None:
        self.times: dict[int, int] = {}
        self.calls: dict[int, _Call] = {}
        self.dims: list[int | None] | None = None
        self.form = ""
        self.fits = True

    def learn(self, call: _Call, output: Any) -> None:
        parts, part_spec = tree_flatten(call.part)
        wholes, spec = tree_flatten(output)
        dims = [_growing(*pair, call.times) for pair in zip(parts, wholes, strict=False)]
        self.fits = part_spec == spec and all(
            _alike(part, whole, dim, call.times)
            for part, whole, dim in zip(parts, wholes, dims, strict=True)
        )
        self.dims, self.form = dims, str(spec)
        if not self.fits:
            logger.info("a tower runs on all images: what it made of the first alone differs")


@untraced
def take_part(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Forward pre-hook of a tower: of inputs that repeat, the first."""
    state: _Tower = tower.__dict__[_STATE]
    times = state.times.get(get_ident(), 1)
    part = _first_of((args, kwargs), times) if times > 1 and state.fits else None
    if part is None:
        return None
    call = _Call(times, (args, kwargs))
    if state.dims is None:
        call.part = _tried(tower, part)
        state.fits = call.part is not None
    if state.fits:
        state.calls[get_ident()] = call
    return None if state.dims is None else part


def _tried(tower: nn.Module, part: Arguments) -> Any:
    """What a tower returns for the first of its inputs, without gradients; None if nothing."""
    # Sharded layers gather their weights in each call, and all processes have to make the same.
    if is_sharded(tower):
        return None
    args, kwargs = part
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Of reentrant checkpoints, without gradients.
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            return tower.forward(*args, **kwargs)
    except Exception as error:  # whatever a tower raises on other inputs than it was called with
        logger.info("%s is not shared: %s", type(tower).__name__, error)
        return None


@untraced
def repeat(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a tower: what it returned of the first, as often as its inputs repeat."""
    state: _Tower = tower.__dict__[_STATE]
    call = state.calls.pop(get_ident(), None)
    if call is None or output is None:  # nothing repeats, or it raised
        return None
    if call.part is not None:
        state.learn(call, output)
        return None
    leaves, spec = tree_flatten(output)
    dims = state.dims
    if dims is None or str(spec) != state.form:  # other options than in the call learnt from
        state.dims = None
        return tower.forward(*call.whole[0], **call.whole[1])
    repeated = (
        x if dim is None else torch.cat([x] * call.times, dim)
        for x, dim in zip(leaves, dims, strict=True)
    )
    return tree_unflatten(list(repeated), spec)


def _first_of(arguments: Arguments, times: int) -> Arguments | None:
    """The first of so many equal parts of all tensors; None if they do not repeat, or there are
    other arguments than tensors and options."""
    args, kwargs = arguments
    # Some composites hand on all that they were called with.
    values = (*args, *(x for name, x in kwargs.items() if name != CALL))
    if not all(isinstance(x, (Tensor, *_OPTIONS)) for x in values):
        return None
    if not all(repeats(x, times) for x in values if _has_entries(x)):
        return None

    def first(x: Any) -> Any:
        return x[: len(x) // times] if _has_entries(x) else x

    return tuple(map(first, args)), {name: first(x) for name, x in kwargs.items()}


def _has_entries(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0


def _growing(part: Any, whole: Any, times: int) -> int | None:
    """The dimension that is so many times as long in the whole; None if there is none."""
    if not isinstance(part, Tensor) or not isinstance(whole, Tensor) or part.ndim != whole.ndim:
        return None
    longer = (dim for dim in range(part.ndim) if whole.shape[dim] == part.shape[dim] * times > 0)
    return next(longer, None)


def _alike(part: Any, whole: Any, dim: int | None, times: int) -> bool:
    """Whether the whole is so many times the part, but for rounding."""
    if dim is None:
        return part is whole is None
    repeated = torch.cat([part] * times, dim)
    if repeated.shape != whole.shape:
        return False
    size, error = (x.float().norm() for x in (whole.detach(), repeated - whole.detach()))
    return bool(error <= size * ROUNDING)
