"""A tiny random model of any causal-LM type of transformers, from its default config alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: dict[str, str] = dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))
"""Class of every causal-LM model type that transformers knows."""

VOCABULARY = 50
"""Token ids below are text; those of images and the like are above."""

# By patterns of a field's name, the first that matches.
_SIZES: dict[str, float] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "*_token_id *_token_index": 60,
    "vocab_size *_vocab_size *_vocab vocab_size_*": 64,
    "*dropout* *pdrop* *layerdrop* *jitter* *drop_rate": 0,
    "initializer_range init_std initializer_factor": 0.2,
    "max_position_embeddings max_*_positions n_positions *max_seq_len *_max_length n_ctx": 64,
    "*sliding_window *window_size *window_len attention_chunk_size": 5,
    "*experts_per_tok* *moe_topk moe_top_k moe_k topk_group *n_group top_k_experts": 2,
    "num_experts *local_experts *routed_experts moe_num_experts": 4,
    "*shared_experts": 1,
    "*key_value_heads *kv_heads kv_n_heads num_query_groups linear_num_key_heads": 2,
    "*_heads num_heads n_head": 4,
    "*rope_head_dim *nope_head_dim rotary_dim": 4,
    "*head_dim *head_size *d_head *headdim dim_head kv_channels query_pre_attn_scalar": 8,
    "*intermediate_size* *ffn_dim *ffn_hidden_size d_inner dim_ff dff feed_forward_size": 48,
    "*hidden_size* d_model n_embd dim *embedding_size *embedding_dim *emb_dim *embed_dim": 32,
    "adapter_in* adapter_out* *embed_proj_dim attention_hidden_size lru_width mamba_d_ssm": 32,
    "*lora_rank *lowrank adapter_rank *dt_rank time_step_rank gated_norm_rank laurel_rank": 16,
    "*chunk_size *state_size *d_state index_topk *block_size indexer_budget": 8,
    "logit_scale first_k_dense_replace num_dense_layers": 1,
    "*_groups *ngroups expand *_expand *_layer_offset": 1,
    "*_layer_period": 2,
}
_LAYERS = "num_hidden_layers n_layer n_layers num_layers *coder_layers num_blocks depth"
# Fields that a type needs although their default is None, and fields that make a causal LM.
_NEEDED = "*head_dim *key_value_heads *routed_experts *shared_experts *experts_per_tok indexer_*"
_LEFT_OUT = {"architectures", "transformers_version", "dtype", "id2label", "label2id"}

# What the defaults of single types lack or do not fit: as few as can be.
_LINEAR_AND_FULL = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_ASSISTANT |= {"num_hidden_layers": 2, "num_kv_shared_layers": 2}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note_text": {
        "per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2}},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "longcat_flash": {"head_dim": 4},
    "lfm2": _LINEAR_AND_FULL,
    "lfm2_moe": _LINEAR_AND_FULL,
    "qwen4_exp_text": {"indexer_compress_ratio": 2, "indexer_kv_heads": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The default config of a type with the sizes above and a layer of every kind that it has."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(_default_of(kind), **changes))


def tiny_model_of(model_type: str, **changes: Any) -> PreTrainedModel:
    """Through `AutoModelForCausalLM`, in fp32 without dropout, in training mode, with the same
    weights at every call; matrices are so large that attention is far from uniform."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    kind = getattr(transformers, MODEL_TYPES[model_type])
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    config = next((x for x in parts if isinstance(x, kind.config_class)), config)
    model = kind._from_config(config).float().train()
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            else:  # keep what gates and norms start from, but no bias at zero
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def _size(name: str) -> float | None:
    return next((size for names, size in _SIZES.items() if _matches(name, names)), None)


def _default_of(kind: type[PretrainedConfig]) -> PretrainedConfig:
    try:
        return kind()
    except Exception:  # defaults that refuse one another
        return kind(**_OVERRIDES.get(kind.model_type, {}))


def _shrunk(config: PretrainedConfig, **changes: Any) -> dict[str, Any]:
    # What a config derives from its fields is left to it.
    declared = {x.name for x in dataclasses.fields(config)} | {*config.attribute_map.values()}
    declared = (declared | {"per_layer_config"}) - _LEFT_OUT
    fields = {k: v for k, v in config.to_dict().items() if k in declared}
    changes = {**_OVERRIDES.get(config.model_type, {}), **changes}
    layers = getattr(config, "num_hidden_layers", None)
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == layers}
    kept = _one_layer_of_each_kind(lists.values(), layers or 0)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        inner = config.__dict__.get(name)
        if isinstance(inner, PretrainedConfig):
            small[name] = _shrunk(inner, **changes.pop(name, {}))
        elif name in lists:
            small[name] = [_tiny(name, value[i]) for i in kept]
        elif _matches(name, _LAYERS) and isinstance(value, int):
            small[name] = max(2, len(kept))
        else:
            small[name] = _tiny(name, value)
    if "kv_lora_rank" in fields:  # every query head has keys of its own
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "per_layer_config" in fields:
        small["per_layer_config"] = _in_proportion(fields, small, kept)
    small |= {name: True for name in ("is_decoder", "output_router_logits") if name in fields}
    return {**small, **changes}


def _one_layer_of_each_kind(lists: Iterable[list[Any]], layers: int) -> list[int]:
    """The first layer with every value of every field that has one a layer, and two at least."""
    first = {values.index(x) for values in lists for x in values}
    rest = [i for i in range(layers) if i not in first]
    return sorted([*first, *rest[: max(0, 2 - len(first))]])


def _in_proportion(
    fields: dict[str, Any], small: dict[str, Any], kept: list[int]
) -> dict[int, dict[str, Any]]:
    """What single layers have of their own, as much larger or smaller as it was."""
    own = {int(layer): values for layer, values in fields["per_layer_config"].items()}
    return {
        new: {k: int(small[k] * v / fields[k]) for k, v in own[old].items()}
        for new, old in enumerate(kept)
        if old in own
    }


def _tiny(name: str, value: Any) -> Any:
    size = _size(name)
    if size is None or isinstance(value, bool | str | list | tuple | dict):
        return value
    if value is None:
        return size if _matches(name, _NEEDED) else None
    return type(value)(size)
