"""Rows of a batch, and descriptors of a packed row, as callers give them: checked, on the host.

Knows numpy and torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray | Sequence[Sequence[int]]


class HostRows(NamedTuple):
    """Rows on the host.

    Attributes:
        ids: `[R, L]` int64.
        mask: `[R, L]` bool, of real tokens.
        positions: `[R, L]` int64; None where they are the columns.
        documents: `[D]` int64, the cells in which documents begin; None where each row is one.
        numbered: whether the mask that was given holds other values than 0 and 1.
    """

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray | None = None
    documents: np.ndarray | None = None
    numbered: bool = False


def has_holes(mask: np.ndarray) -> bool:
    """Whether real tokens of some row of the `[R, L]` bool mask are not contiguous."""
    starts = np.diff(mask.astype(np.int8), prepend=0) == 1
    return bool((starts.sum(1) > 1).any())


def host_rows(
    input_ids: ArrayLike, attention_mask: ArrayLike | None, position_ids: ArrayLike | None
) -> HostRows:
    """The arguments of a call on the host, by one copy from the device.

    Rows hold several documents where they come with positions and without a mask, as for the masks
    of transformers: a position that does not follow the one before it begins a document.
    """
    ids = _as_rows("input_ids", input_ids)
    given = [ids]
    if attention_mask is not None:
        mask = _as_rows("attention_mask", attention_mask, ids.shape)
        given.append(torch.where((mask == 0) | (mask == 1), mask, 2))
    if position_ids is not None:
        given.append(_as_rows("position_ids", position_ids, ids.shape))
    if any(x.is_meta for x in given):
        raise ValueError(
            "rows are on the meta device, where they hold no values, but they are needed to plan; "
            "move the batch to the model's device, or call the model unpatched for shapes alone"
        )
    device = ids.device
    host = list(torch.stack([x.to(device, torch.int64) for x in given]).cpu().numpy())
    positions = None if position_ids is None else host.pop()
    if attention_mask is not None:
        tokens, values = host
        return HostRows(tokens, values > 0, positions, numbered=bool((values > 1).any()))
    documents = None
    if positions is not None:
        starts = np.flatnonzero(np.diff(positions, prepend=positions[:, :1]) != 1)
        documents = starts if len(starts) > len(positions) else None
    return HostRows(host[0], np.ones(ids.shape, bool), positions, documents)


def _as_rows(name: str, x: ArrayLike, shape: torch.Size | None = None) -> Tensor:
    try:
        rows = x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} is a {type(x).__name__} that makes no tensor ({error}), but [R, L] integers "
            "are needed; pad the rows to one length, and give a tensor, an array or lists"
        ) from None
    if not rows.numel() and isinstance(x, Sequence):  # nothing says what an empty list holds
        rows = torch.zeros((len(x), 0), dtype=torch.int64)
    others = rows.is_floating_point() or rows.dtype == torch.bool
    if rows.is_complex() or (others and name != "attention_mask"):
        raise TypeError(
            f"{name} is of {rows.dtype}, but must be of integers; pass {name}.long() if these are "
            "whole numbers"
        )
    if name == "position_ids" and shape is not None and rows.shape == (1, shape[1]):
        rows = rows.expand(shape)
    if rows.ndim != 2 or (shape is not None and rows.shape != shape):
        need = "[R, L]" if shape is None else f"{list(shape)}, the shape of input_ids,"
        raise ValueError(
            f"{name} has shape {list(rows.shape)}, but {need} is needed; pass rows "
            "padded to one length"
        )
    return rows


def not_a_mask(mask: ArrayLike) -> ValueError:
    """Of other values than 0 and 1, which have other meanings elsewhere: what is added to scores,
    numbers of documents."""
    values = _as_rows("attention_mask", mask)
    low, high = values.min().item(), values.max().item()
    return ValueError(
        f"attention_mask holds values from {low} to {high}, but must hold 1 at real tokens and 0 "
        "in the padding; pass the padding mask of a tokenizer or collator"
    )


def check_descriptor(name: str, x: Any) -> None:
    """Refuse a descriptor of a packed row that holds no integers."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        given = f"of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(
            f"{name} is {given}, but must be a tensor of integers; pass what "
            "PrefixTree.model_kwargs() gives"
        )
    if x.is_meta:
        raise ValueError(
            f"{name} is on the meta device, where it holds no values, but they are needed to plan; "
            "move the batch to the model's device, such as batch.to(model.device)"
        )


def check_range(name: str, values: np.ndarray, largest: int) -> None:
    """Refuse values below 0 or above the largest."""
    if values.min() < 0 or values.max() > largest:
        raise ValueError(
            f"{name} of real tokens lie in [{values.min()}, {values.max()}], but must lie in "
            f"[0, {largest}]; mask the cells that hold no token"
        )
