"""The completion tokens of a batch, and where the hidden states that predict them are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_prefix_patch.packed import LOSS_INPUTS

_MIXED = (
    f"{', '.join(LOSS_INPUTS)} say where the completions of a packed batch are, but do not fit it "
    "or one another; pass those of the same batch, as DataCollatorWithPrefixSharing makes it"
)


class CompletionTokens(NamedTuple):
    """Completion tokens of a batch.

    Attributes:
        cells: `[U]`, where the hidden state that predicts each distinct one is, rows end to end.
        labels: `[U]`, the tokens.
        repeated: `[C]`, for each one, row by row, which of the `U` it is; None if `U` is `C`.
        lengths: `[R]`, how many each row has.
    """

    cells: Tensor
    labels: Tensor
    repeated: Tensor | None
    lengths: Tensor


def completion_tokens(batch: Mapping[str, Any]) -> CompletionTokens:
    """Of a packed batch as its collator says, else of rows and their `completion_mask`.

    Raises:
        ValueError: the batch does not say, or its rows do not fit together.
        TypeError: what are no tensors of their kind.
    """
    if all(name in batch for name in LOSS_INPUTS):
        given = {name: batch[name] for name in LOSS_INPUTS}
        _check_packed(given, batch.get("input_ids"))
        return CompletionTokens(*given.values())
    if "completion_mask" not in batch or "input_ids" not in batch:
        raise ValueError(
            f"the batch has {sorted(batch)}, but needs input_ids and completion_mask [R, L], or "
            f"{list(LOSS_INPUTS)}; use DataCollatorWithPrefixSharing"
        )
    rows = {name: batch[name] for name in ("input_ids", "completion_mask")}
    if batch.get("attention_mask") is not None:
        rows["attention_mask"] = batch["attention_mask"]
    for name, x in rows.items():
        _check_rows(name, x, rows["input_ids"])
    ids, mask, real = rows["input_ids"], rows["completion_mask"], rows.get("attention_mask")
    predicted = mask != 0 if real is None else (mask != 0) & (real != 0)
    predicted[:, 0] = False
    if real is not None:
        predicted[:, 1:] &= real[:, :-1] != 0
    cells = predicted.flatten().nonzero()[:, 0]
    return CompletionTokens(cells - 1, ids.flatten()[cells], None, predicted.sum(1))


def _check_packed(given: Mapping[str, Any], ids: Any) -> None:
    """Values are looked at on the device: a GPU is not waited for."""
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.ndim != 1 or x.is_floating_point() or x.is_meta:
            shown = f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x)
            raise TypeError(
                f"{name} is {shown}, but must be a tensor of integers [n] that holds values; pass "
                "the whole batch as DataCollatorWithPrefixSharing makes it"
            )
    cells, labels, repeated, lengths = given.values()
    if len(cells) != len(labels):
        raise ValueError(_MIXED)
    tokens = None if not isinstance(ids, Tensor) else ids.shape[-1]
    fits = lengths.sum() == len(repeated)
    for index, size in ((repeated, len(cells)), (cells, tokens)):
        if len(index) and size is not None:
            fits = fits & (index.max() < size).to(fits.device)
    if fits.is_cuda:
        torch._assert_async(fits, _MIXED)
    elif not fits:
        raise ValueError(_MIXED)


def _check_rows(name: str, x: Any, ids: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is a {type(x).__name__}, but must be a tensor [R, L]; pass torch.tensor of "
            "rows padded to one length"
        )
    if x.ndim != 2 or x.shape != ids.shape:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, but input_ids {list(ids.shape)}, and both must be "
            "the rows [R, L] of one batch; pass what one collator made"
        )
    if x.device != ids.device:
        raise ValueError(
            f"{name} is on {x.device}, but input_ids on {ids.device}, and both must be on one "
            "device; move the whole batch to that of the model"
        )
