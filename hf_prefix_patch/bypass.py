"""What is bypassed at run time: calls that run as they are, why, and what to do about it."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from transformers import PreTrainedModel

from hf_prefix_patch.adapters import adapter_reason
from hf_prefix_patch.features import has_neftune, is_causal, is_known_attention

CACHE_BY_DEFAULT = "key/value cache by default"
LAYERS_CHANGED = "layers or layer types changed after enabling"
FORWARD_MODE = "a torch.func transformation or forward-mode differentiation"

_POSITIONS = "pass integers of the shape of input_ids, counted from 0 in each row"
_TEXT_ALONE = "give rows of text alone: images that a model takes in this way cannot be shared"
_OWN_ROWS = "give each document a row of its own (packing=False, padding_free=False)"
_UNSHARED = "call without this adapter; as it is, such a call is for rows, not for tokens"

ADVICE = {
    CACHE_BY_DEFAULT: "pass use_cache=False, or set it in the model's config, which asks for a "
    "cache outside training",
    "key/value cache": "pass use_cache=False, unless the call generates",
    "inputs_embeds": "pass input_ids, which sharing compares, and enable the model that is called, "
    "not the text decoder in it; prompt learning of PEFT cannot be shared",
    "attention mask that is not [rows, length]": "pass the padding mask, ones and zeros",
    "attention mask of other values than 0 and 1": "pass ones and zeros; of several documents in a "
    "row no mask, position_ids that count from 0 in each, and use_cache=False",
    "attention mask with holes": "remove the tokens that are masked inside of rows",
    "no real token": "leave empty batches out, and check the attention mask",
    "position_ids that are not [rows, length]": _POSITIONS,
    "position_ids that are not integers": _POSITIONS,
    "negative position_ids": _POSITIONS,
    "position_ids that jump": "count from 0 in each document",
    "several documents in a row, with images or sound": _OWN_ROWS,
    "several documents in a row, of a model that was not verified": "leave verify=True, which "
    f"tries whether this model keeps documents apart, or {_OWN_ROWS}",
    "several documents in a row, and another attention than was verified": "call "
    "enable_prefix_sharing again",
    "several documents in a row, which this model was not seen to keep apart": f"{_OWN_ROWS}; as "
    "it is, each may depend on those before it, without sharing too",
    "several documents in each of several rows, in flash attention": "put all documents into one "
    "row: transformers does not keep them apart in several, without sharing either",
    "boundaries of documents that are not those of position_ids": "leave out cu_seq_lens_q, "
    "cu_seq_lens_k and seq_idx, or count position_ids from 0 in each document",
    "several documents in a row, and a cache": "pass use_cache=False: beside a cache, even one "
    "that nobody reads, transformers may not keep documents apart, without sharing either",
    "input '...' beside the text": _TEXT_ALONE,
    "output_attentions": "ask for attention weights in a separate call",
    "input '...'": "leave it out of the call, if the model does without; docs/trainers.md lists "
    "the known ones",
    "bidirectional attention": "set is_causal and use_bidirectional_attention back in the model's "
    "config, or is_causal of its attention modules",
    LAYERS_CHANGED: "call enable_prefix_sharing again, or set config.sliding_window back if it "
    "changed",
    "attention function '...'": "load the model with attn_implementation='sdpa', if the function "
    "computes the same",
    "NEFTune": "set neftune_noise_alpha=None",
    "rotary frequencies that depend on padding": "pad rows to the longest of them only",
    "recurrent layers with a bias that is added to padding before a row": "pad on the right",
    "adapters chosen by row": _UNSHARED,
    "an adapter that depends on the batch": _UNSHARED,
    "PEFT reads the activations of rows": "wait until PEFT has initialised its adapter",
    "context parallel": "set cp_size and sp_size of accelerate, or verl's "
    "ulysses_sequence_parallel_size, to 1",
    FORWARD_MODE: "use torch.autograd's backward",
    "tracing or export": "call disable_prefix_sharing(model) before, as what is made serves other "
    "batches too",
    "DataParallel, which parts the rows of a batch": "use DistributedDataParallel: "
    "accelerate launch or torchrun start a process for each device",
    "a mask that is not causal attention to real tokens": _TEXT_ALONE,
    "position_ids that differ between rows": _TEXT_ALONE,
    "input '...' that differs between rows": _TEXT_ALONE,
    "features '...' that differ between rows": "switch off what is random before the text decoder "
    "(dropout in a vision tower or its adapters), or give rows without images or sound",
    "input '...' of the text decoder": _TEXT_ALONE,
}
"""What to do about calls that are bypassed, for every reason but that there is nothing to gain;
'...' stands for a name. docs/limits.md has all."""

_CACHES = {"cache", "past_key_values", "cache_params"}  # as transformers has called it
# Inputs of a decoder stack that sharing understands, or that do not change its hidden states.
KNOWN_INPUTS = _CACHES | {"input_ids", "attention_mask", "position_ids", "inputs_embeds"}
KNOWN_INPUTS |= {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
KNOWN_INPUTS |= {"return_dict", "labels", "shift_labels", "num_items_in_batch"}
# What trainers and heads hand a decoder stack although it is for the head or the loss. A stack that
# has a parameter of this name reads it (Gemma 4 computes some layers for `logits_to_keep` alone).
PASSED_THROUGH = {"logits_to_keep", "margin"}

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What layers may be told of several documents in a row, which their positions say too."""

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What composite models are told of their tokens: whether they stand for text or for an image."""


def advice(reason: str) -> str:
    """What to do to have such a call shared."""
    return ADVICE[re.sub("'[^']*'", "'...'", reason)]


def bypass_reason(
    backbone: PreTrainedModel, inputs: dict[str, Any], cache_by_default: bool = True
) -> str | None:
    """Why this call must run as it is; None if its rows can be packed.

    Args:
        backbone: the decoder stack, or the composite around it.
        inputs: its keyword arguments, `input_ids` `[R, L]` among them.
        cache_by_default: whether a caller outside training who does not say so may go on from the
            cache that the config asks for.
    """
    config, ids = backbone.config.get_text_config(decoder=True), inputs.get("input_ids")
    if getattr(backbone, "_is_replica", False):
        return "DataParallel, which parts the rows of a batch"
    unread = unreadable(ids)
    if unread is not None:
        return unread
    if ids is None or inputs.get("inputs_embeds") is not None:
        return "inputs_embeds"
    if inputs.get("use_cache") or any(inputs.get(name) is not None for name in _CACHES):
        return "key/value cache"
    # In training nobody reads a cache; elsewhere the caller may go on from it.
    by_default = inputs.get("use_cache") is None and getattr(config, "use_cache", False)
    if by_default and cache_by_default and not backbone.training:
        return CACHE_BY_DEFAULT
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        return "attention mask that is not [rows, length]"
    if positions is not None:
        shapes = ids.shape, ids[:1].shape
        if not (isinstance(positions, Tensor) and positions.shape in shapes):
            return "position_ids that are not [rows, length]"
        if positions.is_floating_point():
            return "position_ids that are not integers"
    asked = inputs.get("output_attentions")
    if getattr(config, "output_attentions", False) if asked is None else asked:
        return "output_attentions"
    known = KNOWN_INPUTS
    if mask is None and positions is not None:
        known = known.union(BOUNDARIES)
    if config is not backbone.config:
        known = known.union(TOKEN_TYPES, _options(backbone, inputs))
    for name, x in inputs.items():
        if name not in known and x is not None and not passes_through(backbone, name, x):
            if config is backbone.config:
                return f"input {name!r}"
            return f"input {name!r} beside the text"
    if not is_causal(config):
        return "bidirectional attention"
    if not is_known_attention(config._attn_implementation):
        return f"attention function {config._attn_implementation!r}"
    if backbone.training and has_neftune(backbone):
        return "NEFTune"
    adapters = adapter_reason(backbone)
    if adapters is not None:
        return adapters
    if _context_parallel():
        return "context parallel"
    return None


def unreadable(x: Any) -> str | None:
    """Why no value of a tensor can be looked at, or not all of it; None if it can."""
    dual = forward_ad._current_level >= 0  # tensors with tangents, which attention would drop
    if dual or torch._C._functorch.peek_interpreter_stack() is not None:
        return FORWARD_MODE
    traced = torch._C._is_tracing() or isinstance(x, FakeTensor)
    if traced or torch.compiler.is_exporting():
        return "tracing or export"
    return None


def passes_through(stack: PreTrainedModel, name: str, value: Any) -> bool:
    """Whether an argument is for the head or the loss, and this stack does not read it."""
    reads = name in inspect.signature(stack.forward).parameters
    keeps_all = isinstance(value, int) and value == 0  # what heads of Gemma 4 hand on by default
    return name in PASSED_THROUGH and (not reads or keeps_all)


def _options(composite: PreTrainedModel, inputs: dict[str, Any]) -> set[str]:
    """Inputs that say how a composite treats images, and hold none; others it would hand on."""
    own = inspect.signature(composite.forward).parameters.keys() & inputs.keys()
    lists = {name: x if isinstance(x, list | tuple) else [x] for name, x in inputs.items()}
    return {name for name in own if all(isinstance(x, int | float | str) for x in lists[name])}


def _context_parallel() -> bool:
    """Whether rows are split over processes, by accelerate, by PyTorch or by verl."""
    state = sys.modules.get("accelerate.state")
    shared = state.AcceleratorState._shared_state if state else {}
    plan = shared.get("parallelism_config")
    by_accelerate = any((getattr(plan, name, None) or 1) > 1 for name in ("cp_size", "sp_size"))
    called = F.scaled_dot_product_attention.__module__ or ""  # exchanged in `context_parallel`
    ulysses = sys.modules.get("verl.utils.ulysses")
    by_verl = ulysses is not None and ulysses.get_ulysses_sequence_parallel_world_size() > 1
    return by_accelerate or called.startswith("torch.distributed.") or by_verl
