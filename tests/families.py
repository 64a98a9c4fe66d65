"""Tiny random models of every family that is tested, made from configs alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # With the usual 0.02 attention is nearly uniform and a leak would hardly show.
    "initializer_range": 0.2,
}
_WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, **_WINDOWED}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, **_WINDOWED}),
    "gemma3": ("Gemma3", {"query_pre_attn_scalar": 8, **_WINDOWED}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1, **_EXPERTS},
    ),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, **_WINDOWED, **_EXPERTS}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None, **_EXPERTS}),
}

NO_SDPA = {"gemma2", "gpt-oss"}
"""Families for which transformers has no sdpa: a soft cap, sinks."""


def tiny_model(family: str = "llama", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A two-layer model in fp32 with the same weights at every call, in training mode."""
    name, options = FAMILIES[family]
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    sizes = {**_SIZES, **options, **changes}
    config = getattr(transformers, kind)(**sizes, attn_implementation=attention)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()
