"""The plan of a batch, and the last one, kept for the reference forward of the same batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_prefix_patch.backends.base import Backend, Needs
from hf_prefix_patch.rows import ArrayLike, HostRows, has_holes, host_rows
from hf_prefix_patch.tree import PrefixTree, to_device

NOTHING_TO_GAIN = "nothing to gain"
ROW_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""The arguments of a call that its plan depends on."""

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Plan:
    """The tree of a batch, or why there is none to use.

    Attributes:
        tree: on the host.
        reason: why the rows must run as they are; None if they can be packed.
        padded_beyond: whether a padded cell has a larger position than every token.
        padded_before: whether a row begins with padding.
        documents: as in `HostRows`.
        largest_id, largest_position: of the real tokens; -1 where there is no tree, or they were
            not looked at.
    """

    tree: PrefixTree | None
    reason: str | None
    padded_beyond: bool = False
    padded_before: bool = False
    documents: np.ndarray | None = None
    largest_id: int = -1
    largest_position: int = -1
    _made: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
    ) -> Plan:
        """Plan the `[R, L]` rows of a call; shapes as in `PrefixTree.from_rows`."""
        return cls.of_host_rows(host_rows(input_ids, attention_mask, position_ids))

    @classmethod
    def of_host_rows(cls, rows: HostRows) -> Plan:
        """The same for rows on the host."""
        ids, mask, positions, documents, numbered = rows
        if numbered:
            return cls(None, "attention mask of other values than 0 and 1")
        if has_holes(mask):
            return cls(None, "attention mask with holes")
        if not mask.any():
            return cls(None, "no real token")
        if positions is not None and positions[mask].min() < 0:
            return cls(None, "negative position_ids")
        if documents is not None and positions is not None and positions.flat[documents].any():
            return cls(None, "position_ids that jump")
        tree = PrefixTree.from_host_rows(rows)
        last = ids.shape[1] - 1 if positions is None else int(positions.max())
        largest = int(ids.reshape(-1)[tree.source.numpy()].max()), int(tree.position_ids.max())
        beyond = last > largest[1]
        before = bool((~mask[:, 0] & mask.any(axis=1)).any())
        reason = None if tree.packed_tokens < tree.padded_tokens else NOTHING_TO_GAIN
        return cls(tree, reason, beyond, before, documents, *largest)

    def on(self, device: torch.device) -> PrefixTree:
        """The tree on the device of a call; moved once."""
        return self._once(device, lambda tree: tree.to(device))

    def copies(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cells that hold a token which is read from another one, and those they are read from."""

        def cells(tree: PrefixTree) -> tuple[Tensor, Tensor]:
            kept = tree.source[tree.packed_index]
            copies = tree.cell != kept
            return to_device(tree.cell[copies], device), to_device(kept[copies], device)

        return self._once(("copies", device), cells)

    def backend_kwargs(self, backend: Backend, needs: Needs) -> dict[str, Any]:
        """What the backend plans for this tree, once."""
        return self._once((backend, needs), lambda tree: backend.plan(tree, needs))

    def _once(self, key: Hashable, make: Callable[[PrefixTree], Made]) -> Made:
        """What is made of the tree, kept under this key."""
        assert self.tree is not None
        if key not in self._made:
            with torch.inference_mode(False):  # it may serve a training call next
                self._made[key] = make(self.tree)
        made: Made = self._made[key]
        return made


def recall_plan(rows: Sequence[Tensor | None]) -> Plan:
    """The last plan if it was made for equal rows, else a new one; `rows` as in `ROW_INPUTS`."""
    global _last
    last = _last  # read once: another thread may be planning for another model
    if last is None or not all(map(_equal, last[0], rows)):
        with torch.inference_mode(False):  # the plan may serve a training call next
            assert rows[0] is not None
            plan = Plan.of_rows(rows[0], *rows[1:])
            # Copies: a caller may write into its buffers by ways that leave no mark on them.
            last = [None if x is None else x.clone() for x in rows], plan
        _last = last
    return last[1]


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
