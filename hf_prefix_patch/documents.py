"""Rows that hold several documents, told apart by positions that begin again: padding-free batches.

What they mean depends on the model, its attention and the call: some look across them. They are
shared, each as a row of its own, where the unpatched model keeps them apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.bypass import BOUNDARIES
from hf_prefix_patch.features import is_flash
from hf_prefix_patch.plans import Plan

_TELLING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # where documents begin


class Trial(NamedTuple):
    """What verification saw of a model.

    Attributes:
        implementation: the attention that it had.
        apart: whether documents in one row did not see one another.
    """

    implementation: str
    apart: bool


def documents_reason(
    backbone: PreTrainedModel, inputs: dict[str, Any], trial: Trial | None, media: bool
) -> str | None:
    """Why rows must run as they are because they hold several documents; None if they hold one
    each, or can be shared.

    Args:
        backbone: the decoder stack, or the composite around it.
        inputs: of a call that `bypass_reason` lets through.
        trial: of this model, if it was verified.
        media: whether the call holds images or sound.
    """
    positions: Tensor | None = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or positions is None:
        return None
    reason = _reason_of_several(backbone, inputs, trial, media)
    # Last, as it waits for the device.
    return reason if reason and bool((positions.diff(dim=-1) != 1).any()) else None


def _reason_of_several(
    backbone: PreTrainedModel, inputs: dict[str, Any], trial: Trial | None, media: bool
) -> str | None:
    config, asked = backbone.config.get_text_config(decoder=True), inputs.get("use_cache")
    by_default = any(getattr(x, "use_cache", False) for x in (backbone.config, config))
    if media:
        return "several documents in a row, with images or sound"
    if trial is None:
        return "several documents in a row, of a model that was not verified"
    if trial.implementation != config._attn_implementation:
        return "several documents in a row, and another attention than was verified"
    if not trial.apart:
        return "several documents in a row, which this model was not seen to keep apart"
    if len(inputs["input_ids"]) > 1 and is_flash(config._attn_implementation):
        return "several documents in each of several rows, in flash attention"
    if by_default if asked is None else asked:
        return "several documents in a row, and a cache"
    return None


def boundaries_agree(inputs: dict[str, Any], plan: Plan) -> bool:
    """Whether the documents of a plan are those that the call tells its layers of, if it does."""
    told = {name: inputs[name] for name in _TELLING if inputs.get(name) is not None}
    if not told:
        return True
    if not all(isinstance(x, Tensor) for x in told.values()):
        return False
    ids: Tensor = inputs["input_ids"]
    starts = range(0, ids.numel(), ids.shape[1]) if plan.documents is None else plan.documents
    ends = torch.tensor([*starts, ids.numel()], device="cpu")
    numbers: Tensor | None = told.pop("seq_idx", None)  # of each token's document
    if numbers is not None:
        if numbers.shape != ids.shape:
            return False
        flat = numbers.flatten().cpu()
        changes = flat[1:] != flat[:-1]
        if not torch.equal(changes.nonzero()[:, 0] + 1, ends[1:-1]):
            return False
    return all(torch.equal(x.cpu().long(), ends) for x in told.values())


def without_boundaries(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call but for what it tells its layers of the documents in its rows, which
    are not those of the packed row."""
    return {name: x for name, x in inputs.items() if name not in BOUNDARIES}
