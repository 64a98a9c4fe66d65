"""What a decoder stack is made of, as its config and its modules say."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as hf_flash
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_prefix_patch import versions

SHARED_LAYER_TYPES = {"full_attention", "sliding_attention"}
RECURRENT_LAYER_TYPES = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}
TOKENWISE_LAYER_TYPES = {"mlp", "moe"}  # layers without attention
_DROPOUTS = (  # what attention layers call it
    "attention_dropout",
    "attn_drop",
    "attn_dropout",
    "attn_pdrop",
    "dropout",
    "dropout_p",
    "dropout_prob",
)
_POSITIONS = {"wpe", "position_embeddings"}  # what learned embeddings of positions are called


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether layers carry a state from token to token beside attention."""
    stateful = getattr(model, "_is_stateful", False)
    return stateful or not RECURRENT_LAYER_TYPES.isdisjoint(layer_types(model.config))


def is_classifier(config: Any) -> bool:
    """Whether the checkpoint is a sequence classifier, as reward models are."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def layer_types(config: Any) -> list[str]:
    """Type of each decoder layer, from what the config says."""
    named = named_layer_types(config)
    if named:
        return ["full_attention" if kind == "attention" else kind for kind in named]
    kind = "sliding_attention" if sliding_window(config) else "full_attention"
    return [kind] * config.num_hidden_layers


def named_layer_types(config: Any) -> list[str] | None:
    """What the config itself calls its layers; None if it does not."""
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)


def sliding_window(config: Any) -> int | None:
    """Keys that a query of a sliding layer sees, its own included."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def layer_slides(config: Any, layer: int) -> bool:
    """Whether a decoder layer has a sliding window."""
    types = layer_types(config)
    if layer >= len(types):  # of a stack with layers added
        return set(types) == {"sliding_attention"}
    return types[layer] == "sliding_attention"


def is_attention(module: nn.Module) -> bool:
    """Whether a module is named for attention, or calls transformers' attention registry (as the
    MLA layers of LongCat do)."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    called = getattr(code, "co_names", ())
    return "attention" in type(module).__name__.lower() or "ALL_ATTENTION_FUNCTIONS" in called


def drops_attention(backbone: nn.Module) -> bool:
    """Whether attention layers drop weights in training, as a rate or a module of theirs says."""
    rates = (
        getattr(rate, "p", rate)
        for module in backbone.modules()
        if is_attention(module)
        for rate in (getattr(module, name, None) for name in _DROPOUTS)
    )
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def has_neftune(model: PreTrainedModel) -> bool:
    """Whether the embeddings carry NEFTune's mark (transformers sets it when training begins)."""
    return getattr(model.get_input_embeddings(), "neftune_noise_alpha", None) is not None


def vocabulary_size(decoder: PreTrainedModel) -> int | None:
    """Ids that the embeddings take, where they say so."""
    embeddings: Any = decoder.get_input_embeddings()
    inner = getattr(embeddings, "base_layer", embeddings)  # of PEFT
    size = getattr(inner, "num_embeddings", None)
    return size if isinstance(size, int) else None


def learned_positions(decoder: PreTrainedModel) -> int | None:
    """Positions that a model with a learned embedding of them has; None for any other model."""
    tables = (m for name, m in decoder.named_modules() if name.split(".")[-1] in _POSITIONS)
    table = next((m for m in tables if isinstance(m, nn.Embedding)), None)
    return None if table is None else table.num_embeddings


def has_sinks(backbone: nn.Module) -> bool:
    """Whether attention layers have sinks, a learnt score beside those of the keys."""
    return any(getattr(module, "sinks", None) is not None for module in backbone.modules())


def expert_counts(config: Any) -> list[int]:
    """Experts of a layer, by each of the names that configs have for it."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return [count for name in names if (count := getattr(config, name, None))]


def has_experts(config: Any) -> bool:
    """Whether the model routes tokens to experts."""
    return any(count > 1 for count in expert_counts(config))


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a layer has weights quantised by bitsandbytes."""
    return any(cls.__module__.partition(".")[0] == "bitsandbytes" for cls in type(module).__mro__)


def is_flash(implementation: str | None) -> bool:
    """Whether an attention implementation, as configs name them, is one of FlashAttention."""
    return "flash" in (implementation or "")


def is_known_attention(implementation: str | None) -> bool:
    """Whether an attention implementation computes what transformers' own do, and no function that
    was registered, or that was put in the place of what transformers' flash attention calls."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if function is None:
        return True
    function = _written(function)
    called = getattr(function, "__globals__", {}).get("_flash_attention_forward")
    # The second is what the backend calls. In the place of the first verl has its own always, which
    # calls transformers' unless rows are split.
    for inner in () if called is None else (called, hf_flash._flash_attention_forward):
        if _package(inner) not in ("transformers", "verl"):
            return False
    from_hub = is_flash(implementation) and "/" in (implementation or "")
    return from_hub or _package(function) == "transformers"


def _written(function: Any) -> Any:
    """What `functools.partial`, `torch.compiler.disable` and `torch.compile` are around."""
    inner = getattr(function, "func", None)
    if inner is None and _module(function).startswith("torch."):
        inner = getattr(function, "__wrapped__", None)
    return function if inner is None else _written(inner)


def _package(function: Any) -> str:
    return _module(_written(function)).partition(".")[0]


def _module(function: Any) -> str:
    """Where a function was written, whatever it passes for (`functools.wraps`)."""
    written: str | None = getattr(function, "__globals__", {}).get("__name__")
    return written or getattr(function, "__module__", None) or ""


def flash_dtype(config: Any) -> torch.dtype | None:
    """The type that transformers' flash attention casts fp32 queries, keys and values of a
    quantised model to, where autocast is off; None for any other model or implementation."""
    mark, name = versions.QUANTIZED
    if not is_flash(config._attn_implementation) or not hasattr(config, mark):
        return None
    dtype: torch.dtype | str | None = getattr(config, name)
    # Saving a model leaves a name there.
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def rope_depends_on_length(config: Any) -> bool:
    """Whether the rotary frequencies depend on the longest position of the call."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    entries = [parameters or {}, *(x for x in (parameters or {}).values() if isinstance(x, dict))]
    kinds = {str(entry.get("rope_type", entry.get("type"))) for entry in entries}
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def is_causal(config: Any) -> bool:
    """Whether no token sees a later one."""
    bidirectional = getattr(config, "use_bidirectional_attention", False)
    # "vision" is for image tokens, and calls with such inputs are bypassed.
    causal = not bidirectional or bidirectional == "vision"
    return getattr(config, "is_causal", True) is not False and causal


def outlier_threshold(module: nn.Module) -> float:
    """From which activation on an 8-bit layer of bitsandbytes takes a column out."""
    return getattr(getattr(module, "state", None), "threshold", 0.0) or 0.0
