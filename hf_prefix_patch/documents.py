"""Rows that hold several documents, told apart by positions that begin again: padding-free batches.

What they mean depends on the model, its attention and the call: some look across them. They are
shared, each as a row of its own, where the unpatched model keeps them apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.bypass import BOUNDARIES, DOCUMENTS
from hf_prefix_patch.features import is_flash
from hf_prefix_patch.plans import Plan

_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")


def documents_reason(
    decoder: PreTrainedModel, inputs: dict[str, Any], plan: Plan, apart_in: str | None
) -> str | None:
    """Why a call whose rows may hold several documents must run as it is; None if it can be shared.

    Args:
        decoder: the decoder stack, or the text decoder of a composite.
        inputs: of the call.
        plan: of its rows.
        apart_in: the attention implementation in which the model was seen to keep documents apart.
    """
    if not _agrees(inputs, plan):
        return "boundaries of documents that are not those of position_ids"
    if plan.documents is None:
        return None
    config, asked = decoder.config, inputs.get("use_cache")
    if getattr(config, "use_cache", False) if asked is None else asked:
        return "several documents in a row, and a cache"
    implementation = config._attn_implementation
    # Flash attention looks at positions where there is one row only.
    together = len(inputs["input_ids"]) > 1 and is_flash(implementation)
    if together or implementation != apart_in:
        return DOCUMENTS
    return None


def _agrees(inputs: dict[str, Any], plan: Plan) -> bool:
    """Whether the documents of the plan are all that a call tells its layers of."""
    rows, length = inputs["input_ids"].shape
    starts = np.arange(0, rows * length, length) if plan.documents is None else plan.documents
    ends = np.append(starts, rows * length)
    told = {name: inputs[name] for name in BOUNDARIES if inputs.get(name) is not None}
    numbers: Tensor | None = told.pop("seq_idx", None)  # of each token's document
    if numbers is not None:
        if numbers.shape != (rows, length):
            return False
        changes = np.diff(numbers.cpu().numpy(), prepend=-1)
        if not np.array_equal(np.flatnonzero(changes), starts):
            return False
    return all(np.array_equal(x.cpu(), ends) for name, x in told.items() if name in _ENDS)


def without_boundaries(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call but for what it tells its layers of the documents in its rows, which
    are not those of the packed row."""
    return {name: x for name, x in inputs.items() if name not in BOUNDARIES}
