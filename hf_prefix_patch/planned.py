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

_SHAPES = {Tensor.view, Tensor.reshape}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.contiguous, Tensor.detach}


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

    def as_packed_row(self) -> PackedRow:
        """The same tensor, to be embedded by a patched model only."""
        row = self.as_subclass(PackedRow)
        return row if self.note is None else row.remember(self.note)  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {"_note": self.note}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._note, self._written = state["_note"], _version(self)

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
        x = args[0] if func in _MOVES else None
        if not isinstance(x, PlannedTensor) or type(result) is not Tensor:
            return result
        if x.note is None or x.dtype != result.dtype:
            return result
        return result.as_subclass(type(x)).remember(x.note)


class PackedRow(PlannedTensor):
    """`[1, N]` token ids of a packed row, which only a patched model may embed.

    It stays one when a model gives it another shape, as many do before they embed.
    """

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
                "a packed row was given to a model that does not share prefixes, or without its "
                "descriptors, and would be read as one long row; call enable_prefix_sharing(model) "
                "first and pass the whole batch, or use a collator with layout='rows'"
            )
        if func is F.pad:  # which the loss of a causal LM begins with
            raise RuntimeError(
                "a packed row was given as labels, but is no row whose next token could be the "
                "label: after a chosen response comes the rejected one; leave labels out and take "
                "completion_logps(model, batch), or use a collator with layout='rows'"
            )
        result = super().__torch_function__(func, types, args, kwargs)
        shaped = func in _SHAPES and type(result) is Tensor
        return result.as_subclass(PackedRow) if shaped else result


def plain(x: Any) -> Any:
    """Planned rows without their class, which compiled code does not take; else what it is, so that
    a packed row stays one, and is not embedded."""
    return x.as_subclass(Tensor) if type(x) is PlannedTensor else x


def attach_plan(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, PlannedTensor]:
    """The tensors, arguments of one call, sharing their memory and remembering the plan."""
    names = frozenset(tensors)
    return {
        name: x.as_subclass(PlannedTensor).remember(_Note(plan, names, name))
        for name, x in tensors.items()
    }


def common_plan(tensors: Mapping[str, Any]) -> Plan | None:
    """The plan that all these arguments remember, if it was made for them and no others."""
    notes = [x.note if isinstance(x, PlannedTensor) else None for x in tensors.values()]
    first = notes[0] if notes else None
    if first is None or first.planned_for != tensors.keys():
        return None
    wanted = [first._replace(name=name) for name in tensors]
    return first.plan if notes == wanted else None


def plan_of(inputs: Mapping[str, Any]) -> Plan | None:
    """The plan that came with the rows of a call, if they are still those that it was made for.

    That every shared token is what it is shared with is checked on the device: not all writes leave
    a mark on a tensor (collectives, numpy, `.data`). A GPU is not waited for.

    Raises:
        RuntimeError: later, from a CUDA device: rows were written to in such a way.
    """
    given = {name: inputs[name] for name in ROW_INPUTS if inputs.get(name) is not None}
    plan = common_plan(given)
    if plan is None or plan.tree is None:
        return plan
    ids = given["input_ids"].as_subclass(Tensor)
    if ids.is_meta:
        return plan
    fits = _fits(plan.on(ids.device), {name: x.as_subclass(Tensor) for name, x in given.items()})
    if ids.is_cuda:
        torch._assert_async(fits, "prefix sharing: rows were written to after they were planned")
        return plan
    return plan if bool(fits) else None


def _fits(tree: PrefixTree, rows: Mapping[str, Tensor]) -> Tensor:
    """Bool scalar: cells of one packed token hold one token, and real cells are the tree's."""
    flat = {name: x.expand(tree.num_rows, -1).flatten() for name, x in rows.items()}
    ids = flat["input_ids"]
    fits = (ids[tree.cell] == ids[tree.source][tree.packed_index]).all()
    if "attention_mask" in flat:
        real = flat["attention_mask"] != 0
        fits &= real[tree.cell].all() & (real.sum() == tree.row_tokens)
    if "position_ids" in flat:
        planned = tree.position_ids[0, tree.packed_index]
        fits &= (flat["position_ids"][tree.cell] == planned).all()
    return fits


def _version(x: Tensor) -> int:
    """Counts what is written to a tensor and its views; -1 where torch does not count."""
    with torch._C.DisableTorchFunctionSubclass():
        return -1 if x.is_inference() else x._version
