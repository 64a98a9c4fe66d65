"""Calls that are given a packed row: what makes one, its plan."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.attention import EMPTY_MASK
from hf_prefix_patch.bypass import bypass_reason
from hf_prefix_patch.columns import REFERENCE_LOGPS
from hf_prefix_patch.planned import common_plan
from hf_prefix_patch.plans import Plan
from hf_prefix_patch.tree import PrefixTree

LOSS_INPUTS = ("logit_index", "logit_labels", "completion_index", "completion_lengths")
"""What a packed batch holds for its loss: see `DataCollatorWithPrefixSharing`."""

_ROUTERS = "output_router_logits"
_DESCRIPTORS = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
_OURS = {*_DESCRIPTORS, "tree_max_seqlen_q", "tree_max_seqlen_k", *LOSS_INPUTS, *REFERENCE_LOGPS}
_OURS |= {"attention_mask", "position_ids"}


def is_packed(inputs: dict[str, Any]) -> bool:
    """Whether the arguments of a call are a packed row and its descriptors."""
    return inputs.get("tree_kv_index") is not None


def take_packed(
    backbone: PreTrainedModel, inputs: dict[str, Any], outdated: str | None
) -> tuple[Plan, dict[str, Any]]:
    """The plan of a packed call, and its arguments without what belongs to the batch alone.

    Args:
        outdated: of `Views`, for this stack.

    Raises:
        ValueError: descriptors that do not fit, or an argument that a packed row cannot run with.
    """
    ids: Tensor | None = inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[0] != 1:
        given = "no input_ids" if ids is None else f"input_ids of shape {list(ids.shape)}"
        raise ValueError(
            f"a call with tree_* descriptors has {given}, but needs the packed row [1, N]; pass "
            "rows without descriptors, or both of PrefixTree.pack and PrefixTree.model_kwargs"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and tuple(mask.shape) != EMPTY_MASK:
        raise ValueError(
            f"a packed row came with an attention_mask of shape {list(mask.shape)}, but all of its "
            "tokens are real and the descriptors say what they see; leave it out"
        )
    described = {name: inputs.get(name) for name in ("position_ids", *_DESCRIPTORS)}
    plan = common_plan({"input_ids": ids, **described}) or _plan_of_descriptors(ids, described)
    assert plan.tree is not None
    if plan.tree.packed_tokens != ids.shape[1]:
        raise ValueError(
            f"input_ids hold {ids.shape[1]} packed tokens, but the tree_* descriptors must fit and "
            f"are for {plan.tree.packed_tokens}; pass those of the same batch"
        )
    rest: dict[str, Any] = {name: x for name, x in inputs.items() if name not in _OURS}
    rest["input_ids"] = ids.as_subclass(Tensor)
    if rest.get("use_cache") is None:
        rest["use_cache"] = False
    reason = bypass_reason(backbone, rest) or outdated
    config = backbone.config.get_text_config(decoder=True)
    routers = rest.get(_ROUTERS, getattr(config, _ROUTERS, False))
    if reason is None and routers:
        reason = "an auxiliary loss of experts, which counts the tokens of rows"
    if reason is not None:
        raise ValueError(
            f"a packed row cannot run with: {reason}; leave it out (output_router_logits=False for "
            "the auxiliary loss), or use a collator with layout='rows'"
        )
    return plan, rest


def _plan_of_descriptors(ids: Tensor, described: dict[str, Any]) -> Plan:
    missing = [name for name, x in described.items() if x is None]
    if missing:
        raise ValueError(
            f"a packed row came without {missing}, but needs all descriptors; pass all of "
            "PrefixTree.model_kwargs()"
        )
    tree = PrefixTree.from_descriptors(**described)
    largest = -1 if ids.is_meta else int(ids.max())
    return Plan(tree, None, largest_id=largest, largest_position=int(tree.position_ids.max()))
