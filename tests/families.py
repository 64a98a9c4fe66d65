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

_MIXED = ["linear_attention", "full_attention", "linear_attention"]
_DELTA_NET = {
    "num_hidden_layers": 3,
    "layer_types": _MIXED,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
_FOUR_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, **_EXPERTS}
_CONV = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5", _DELTA_NET),
    "qwen3-next": (
        "Qwen3Next",
        {"shared_expert_intermediate_size": 16, **_FOUR_EXPERTS, **_DELTA_NET},
    ),
    "olmo-hybrid": ("OlmoHybrid", {**_DELTA_NET, "linear_num_key_heads": 4}),
    "mamba2": (
        "Mamba2",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "nemotron-h": (
        "NemotronH",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "bamba": ("Bamba", {"num_hidden_layers": 3, "attn_layer_indices": [1], **_MAMBA2}),
    "granite-moe-hybrid": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            **_EXPERTS,
            **_MAMBA2,
        },
    ),
    "lfm2": ("Lfm2", _CONV),
    "lfm2-moe": ("Lfm2Moe", {"num_dense_layers": 1, **_FOUR_EXPERTS, **_CONV}),
}
"""Families with recurrent layers, which the package tree-recurrence makes follow the tree."""

NEEDS: dict[str, dict[str, str]] = {
    "gpt-oss": {"transformers": ">=4.55"},
    **{name: {"transformers": ">=5.15"} for name in HYBRIDS},  # as tree-recurrence does
    "granite-moe-hybrid": {"transformers": ">=5.18"},  # before, its stack was not told of routers
    "RecurrentGemma": {"transformers": ">=5.23"},  # before, refused for the type of its layers
}
"""By family, the versions that have it; a test with a parameter `family` is skipped on others."""

NO_SDPA = {"gemma2", "gpt-oss", "mamba2"}
"""Families for which transformers has no sdpa: a soft cap, sinks, no attention at all."""


def sizes() -> dict[str, Any]:
    """What all configs here have in common."""
    return dict(_SIZES)


def tiny_model(family: str = "llama", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A model of two to four layers in fp32, the same weights at every call, in training mode."""
    name, options = (FAMILIES | HYBRIDS)[family]
    kind = f"{name}TextConfig" if name in ("Gemma3", "Qwen3_5") else f"{name}Config"
    if family in NO_SDPA:
        attention = "eager"
    merged = {**sizes(), **options, **changes}
    config = getattr(transformers, kind)(**merged, attn_implementation=attention)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


def set_checkpointing(model: PreTrainedModel, mode: str) -> None:
    if CHECKPOINTING[mode] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[mode]})
        model.enable_input_require_grads()
