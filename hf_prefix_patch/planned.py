"""Tensors that bring along the plan of the batch that they belong to.

A collator plans its batch in a worker process. The plan then has to reach the decoder stack through
whatever lies between: pickling, pinned memory, moves to a device, trainers that pass on the tensors
they know and no others, launchers that slice and join every tensor of a batch along its first
dimension. So it rides on the rows, and on these rows only: what moves a tensor keeps its plan; what
computes with it gives a plain tensor and what writes to it leaves one, for which the model plans as
for any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_prefix_patch.plans import ROW_INPUTS, Plan
from hf_prefix_patch.tree import PrefixTree

_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.contiguous, Tensor.detach}
# Ways to the memory of a tensor that leave no mark on it when something is written there.
_EXPOSES = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage}
_EXPOSES |= {Tensor.storage, Tensor.data.__get__}  # type: ignore[attr-defined]


class _Note(NamedTuple):
    """What a tensor remembers: a plan, the arguments it was made for, and which one it is."""

    plan: Plan
    planned_for: frozenset[str]
    name: str


class PlannedTensor(Tensor):
    """Rows, their mask or their positions, with the plan of their batch.

    To everything else it is a tensor.
    """

    _note: _Note | None = None
    _written: int = 0

    @property
    def prefix_tree(self) -> PrefixTree | None:
        """The plan of the batch, on the host; None if there is none to use."""
        note = self.note
        return None if note is None else note.plan.tree

    @property
    def note(self) -> _Note | None:
        """What it remembers, unless it was written to since, or torch does not count that."""
        return self._note if _version(self) == self._written >= 0 else None

    def remember(self, note: _Note) -> PlannedTensor:
        self._note, self._written = note, _version(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._written = _version(self)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.__deepcopy__:
                return copy.deepcopy(args[0].as_subclass(Tensor), args[1])
            result = func(*args, **(kwargs or {}))
        x = args[0] if args else None
        if not isinstance(x, PlannedTensor):
            return result
        if func in _EXPOSES:
            x._note = None
        if func in _MOVES and type(result) is Tensor and result.dtype == x.dtype:
            note = x.note
            return result if note is None else result.as_subclass(type(x)).remember(note)
        return result


class PackedRow(PlannedTensor):
    """`[1, N]` token ids of a packed row, which only a patched model may embed."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.embedding:
            raise RuntimeError(
                "a packed row was given to a model that does not share prefixes, which would read "
                "its rows as one; call enable_prefix_sharing(model) first, or use a collator with "
                "layout='rows'"
            )
        return super().__torch_function__(func, types, args, kwargs)


def attach_plan(
    plan: Plan, rows: Mapping[str, Tensor], kind: type[PlannedTensor] = PlannedTensor
) -> dict[str, Tensor]:
    """Tensors that share memory with `rows`, named as in `ROW_INPUTS`, and remember the plan."""
    names = frozenset(rows)
    return {
        name: x.as_subclass(kind).remember(_Note(plan, names, name)) for name, x in rows.items()
    }


def plan_of(inputs: Mapping[str, Any]) -> Plan | None:
    """The plan that came with the rows of a call, if it was made for all of these and no others."""
    given = {name: inputs[name] for name in ROW_INPUTS if inputs.get(name) is not None}
    notes = {name: x.note if isinstance(x, PlannedTensor) else None for name, x in given.items()}
    first = notes.get("input_ids")
    if first is None or first.planned_for != notes.keys():
        return None
    same = all(note == first._replace(name=name) for name, note in notes.items())
    return first.plan if same else None


def _version(x: Tensor) -> int:
    """Counts what is written to a tensor and its views; -1 where torch does not count."""
    with torch._C.DisableTorchFunctionSubclass():
        return -1 if x.is_inference() else x._version
