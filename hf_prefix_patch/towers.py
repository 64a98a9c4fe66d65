"""Vision and audio towers: what a batch holds several times they compute once.

Where the images of a batch repeat, a tower runs on the first of them alone, and what it returns is
repeated. How its output grows with its input is learnt by a trial, when a kind of call first comes;
where what it makes of the first alone is not what it makes of it among all, such calls run as
without sharing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from hf_prefix_patch.bypass import unreadable
from hf_prefix_patch.composite import CALL
from hf_prefix_patch.hooking import untraced
from hf_prefix_patch.media import alike, has_entries, repeats
from hf_prefix_patch.modes import evaluating
from hf_prefix_patch.sharded import is_sharded

logger = logging.getLogger(__name__)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_hooking, _trying = Lock(), Lock()  # two threads may run one model
_KINDS = 16  # of calls of a tower that have a trial; those beyond run on all images

_STATE = "_prefix_sharing_tower"
_OPTIONS = (bool, int, float, str, torch.dtype, type(None))


def expect(composite: PreTrainedModel, decoder: PreTrainedModel, times: int) -> None:
    """Tell towers how often the images of the composite's present call repeat, and hook those that
    are not yet: others may have taken their place, or another model with the same has let go.

    A tower takes no part of inputs that do not repeat, so that what it was told of another call is
    wrong in nothing; layers that are checkpointed with a tower run again after later calls.
    """
    for child in composite.children() if composite is not decoder else ():
        if times > 1 and decoder not in child.modules():
            for tower in _models_in(child):
                _hook(tower)
        for module in child.modules() if child is not decoder else ():
            state: _Tower | None = module.__dict__.get(_STATE)
            if state is not None:
                state.times = times


def unhook_towers(composite: PreTrainedModel) -> None:
    """Leave all modules of a composite as they were, copies of its towers as well."""
    for module in composite.modules():
        state: _Tower | None = module.__dict__.get(_STATE)
        if state is not None:
            state.remove(module)


def _hook(tower: nn.Module) -> None:
    with _hooking:
        if _STATE not in tower.__dict__:
            _Tower(tower)


def _models_in(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The models in a module, in wrappers of adapters for example; projectors are none."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _models_in(child)


@dataclass(frozen=True)
class _Growth:
    """How an output grows with the number of images.

    Attributes:
        form: what the output consists of.
        dims: of each tensor in it, the dimension that grows; None for what is None.
    """

    form: str
    dims: tuple[int | None, ...]

    @classmethod
    def of(cls, part: Any, whole: Any, times: int) -> _Growth | None:
        """From the output for the first images and for all; None where all are not so many times
        the first."""
        (parts, _), (wholes, spec) = tree_flatten(part), tree_flatten(whole)
        dims = []
        for ours, theirs in zip(parts, wholes, strict=True):
            dims.append(None if theirs is None else _growing_dim(ours, theirs, times))
            if not _is_repeated(ours, theirs, dims[-1], times):
                return None
        return cls(str(spec), tuple(dims))

    def repeat(self, part: Any, times: int) -> Any:
        """The output for all images; None for a part of another form."""
        leaves, spec = tree_flatten(part)
        if str(spec) != self.form or [x is None for x in leaves] != [d is None for d in self.dims]:
            return None
        pairs = zip(leaves, self.dims, strict=True)
        whole = [None if dim is None else torch.cat([x] * times, dim) for x, dim in pairs]
        return tree_unflatten(whole, spec)


def _growing_dim(part: Tensor, whole: Tensor, times: int) -> int:
    """The dimension that is so many times as long in the whole, while the others are the same.

    Raises:
        ValueError: there is none.
    """
    for dim, size in enumerate(part.shape):
        if (*part.shape[:dim], size * times, *part.shape[dim + 1 :]) == tuple(whole.shape):
            return dim
    raise ValueError(f"{list(part.shape)} for the first images, {list(whole.shape)} for all")


def _is_repeated(part: Tensor | None, whole: Tensor | None, dim: int | None, times: int) -> bool:
    if part is None or whole is None or dim is None:
        return part is whole
    entries, wanted = part.movedim(dim, 0), whole.movedim(dim, 0)
    return bool(alike(torch.cat([entries] * times), wanted))


@dataclass(frozen=True)
class _Call:
    """A call of a tower that runs on the first of its images; `whole` are its arguments for all."""

    times: int
    growth: _Growth
    whole: Arguments


class _Tower:
    """State of one tower; lives on the module.

    Attributes:
        times: how often images repeat in the latest call of its composite.
        learnt: how outputs grow, by kind of call; None where they do not repeat.
        calls: those that are running, by thread.
    """

    def __init__(self, tower: nn.Module) -> None:
        self.times = 1
        self.learnt: dict[tuple[Any, ...], _Growth | None] = {}
        self.calls: dict[int, _Call] = {}
        setattr(tower, _STATE, self)  # first: it is what undoes the rest
        self._hooks: list[Any] = [tower.register_forward_pre_hook(take_first, with_kwargs=True)]
        # Before those of the user, which are for all images.
        options = {"with_kwargs": True, "always_call": True, "prepend": True}
        self._hooks.append(tower.register_forward_hook(repeat_output, **options))

    def remove(self, tower: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()
        delattr(tower, _STATE)


@untraced
def take_first(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Forward pre-hook of a tower: of images that repeat, the first."""
    state: _Tower | None = tower.__dict__.get(_STATE)
    if state is None:
        return None
    state.calls.pop(get_ident(), None)  # one that was broken off
    times, whole = state.times, (args, kwargs)
    first = _first_of(whole, times) if times > 1 else None
    if first is None:
        return None
    with _trying:
        kind = _kind(tower, first)
        if kind not in state.learnt and len(state.learnt) < _KINDS:
            state.learnt[kind] = _learn(tower, first, whole, times)
    growth = state.learnt.get(kind)
    if growth is None:
        return None
    state.calls[get_ident()] = _Call(times, growth, whole)
    return first


@untraced
def repeat_output(
    tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook of a tower: what it made of the first images, as often as these repeat."""
    state: _Tower | None = tower.__dict__.get(_STATE)
    call = None if state is None else state.calls.pop(get_ident(), None)
    if call is None or output is None:  # it ran on all, or raised
        return None
    repeated = call.growth.repeat(output, call.times)
    return tower.forward(*call.whole[0], **call.whole[1]) if repeated is None else repeated


def _first_of(arguments: Arguments, times: int) -> Arguments | None:
    """The first of so many equal parts of all tensors; None if they do not repeat, or there are
    other arguments than tensors and options."""
    args, kwargs = arguments
    # Some composites hand on all that they were called with.
    values = (*args, *(x for name, x in kwargs.items() if name != CALL))
    entries = [x for x in values if has_entries(x)]
    if not all(isinstance(x, (Tensor, *_OPTIONS)) for x in values):
        return None
    if not entries or any(unreadable(x) or x.is_meta for x in entries):
        return None
    if not all(len(x) and repeats(x, times) for x in entries):
        return None

    def first(x: Any) -> Any:
        return x[: len(x) // times] if has_entries(x) else x

    return tuple(map(first, args)), {name: first(x) for name, x in kwargs.items()}


def _kind(tower: nn.Module, arguments: Arguments) -> tuple[Any, ...]:
    """What the form of an output may depend on, and how much a trial proves."""
    args, kwargs = arguments
    read = inspect.signature(tower.forward).parameters
    options: list[tuple[Any, ...]] = []
    for name, x in [*enumerate(args), *kwargs.items()]:
        if isinstance(x, Tensor):
            options.append((name, x.ndim, x.ndim > 0 and len(x) == 1))
        elif isinstance(x, str | bool | torch.dtype) or (name in read and name != CALL):
            options.append((name, x))
    return (tower.training, any(map(_takes_statistics, tower.modules())), *options)


def _learn(tower: nn.Module, first: Arguments, whole: Arguments, times: int) -> _Growth | None:
    """Run a tower on the first images and on all, in evaluation mode and without gradients."""
    name = type(tower).__name__
    # Sharded layers gather their weights in each call, and all processes have to make the same.
    if is_sharded(tower) or any(map(_takes_statistics, tower.modules())):
        logger.info("%s runs on all images: its weights are sharded, or it learns means", name)
        return None
    try:
        with torch.no_grad(), evaluating(tower):
            part, all_ = (tower.forward(*args, **kwargs) for args, kwargs in (first, whole))
        growth = _Growth.of(part, all_, times)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a tower makes of other inputs than it was called with
        logger.info("%s runs on all images: %s: %s", name, type(error).__name__, error)
        return None
    if growth is None:
        logger.info("%s runs on all images: it makes others of them than of the first alone", name)
    return growth


def _takes_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.training and module.track_running_stats
