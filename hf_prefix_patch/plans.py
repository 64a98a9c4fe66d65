"""The plan of a call's rows, and the last one, kept for the reference forward of the same batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.backends.base import Backend, Needs
from hf_prefix_patch.support import rope_depends_on_length
from hf_prefix_patch.tree import PrefixTree, has_holes, host_rows

NOTHING_TO_GAIN = "nothing to gain"


@dataclass(frozen=True)
class Plan:
    """The tree of a batch, or why there is none to use."""

    tree: PrefixTree | None
    reason: str | None
    _of_backends: dict[tuple[Backend, Needs], dict[str, Any]] = field(default_factory=dict)

    def backend_kwargs(self, backend: Backend, needs: Needs) -> dict[str, Any]:
        """What the backend plans for this tree, once."""
        assert self.tree is not None
        key = backend, needs
        if key not in self._of_backends:
            with torch.inference_mode(False):  # it may serve a training call next
                self._of_backends[key] = backend.plan(self.tree, needs)
        return self._of_backends[key]


def plan_rows(backbone: PreTrainedModel, inputs: dict[str, Any]) -> Plan:
    """Plan the rows of a call, or take the last plan if it was made for equal rows."""
    global _last
    rows = [inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")]
    last = _last  # read once: another thread may be planning for another model
    if last is None or not all(map(_equal, last[0], rows)):
        with torch.inference_mode(False):  # the plan may serve a training call next
            plan = _grow(inputs["input_ids"], *rows[1:])
            # Copies: a caller may write into its buffers by ways that leave no mark on them.
            last = [None if x is None else x.clone() for x in rows], plan
        _last = last
    plan = last[1]
    if plan.tree is not None and rope_depends_on_length(backbone.config):
        positions = inputs.get("position_ids")
        longest = plan.tree.row_length - 1 if positions is None else int(positions.max())
        if longest != int(plan.tree.position_ids.max()):
            return Plan(None, "rotary frequencies that depend on padding")
    return plan


def forget() -> None:
    """Let go of the last plan's tensors."""
    global _last
    _last = None


# A cache of a pure function, not state: whatever it holds, a plan fits the rows it is used for.
_last: tuple[list[Tensor | None], Plan] | None = None


def _equal(kept: Tensor | None, given: Tensor | None) -> bool:
    if kept is None or given is None:
        return kept is given
    alike = (kept.shape, kept.dtype, kept.device) == (given.shape, given.dtype, given.device)
    return alike and torch.equal(kept, given)


def _grow(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Plan:
    host_ids, host_mask, host_positions = host_rows(ids, mask, positions)
    if has_holes(host_mask):
        return Plan(None, "attention mask with holes")
    if not host_mask.any():
        return Plan(None, "no real token")
    if host_positions[host_mask].min() < 0:
        return Plan(None, "negative position_ids")
    tree = PrefixTree.from_rows(host_ids, host_mask, host_positions)
    if tree.packed_tokens == tree.padded_tokens:
        return Plan(None, NOTHING_TO_GAIN)
    return Plan(tree.to(ids.device), None)
