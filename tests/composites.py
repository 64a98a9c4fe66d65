"""Tiny composite models, a text decoder with eyes or ears, and batches with images for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from batches import Batch, pad_rows
from families import HYBRIDS, sizes
from transformers import PreTrainedModel

IMAGE = 49
"""The token that stands for a part of an image; four of them make one."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_AXES = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_HALF = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
_WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_EYE = {**_SMALL, "image_size": 8, "patch_size": 4}
_QWEN_EYE = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "temporal_patch_size": 1,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 48,
    "vision_start_token_id": 47,
    "vision_end_token_id": 46,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLLAMA_EYE = {
    "hidden_size": 16,
    "attention_heads": 2,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "vision_output_dim": 32,
    "supported_aspect_ratios": [[1, 1]],
    "intermediate_layers_indices": [0],
}
_EAR = {**_SMALL, "intermediate_size": 32, "num_mel_bins": 8}

COMPOSITES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Class, options of the text decoder, all else.
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        _AXES,
        {"vision_config": {**_QWEN_EYE, "fullatt_block_indexes": [0]}, **_QWEN_IDS},
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoe",
        {**_AXES, **_EXPERTS},
        {"vision_config": {**_QWEN_EYE, "deepstack_visual_indexes": [0]}, **_QWEN_IDS},
    ),
    "qwen3.5": (
        "Qwen3_5",
        {**HYBRIDS["qwen3.5"][1], **_HALF},
        {"vision_config": _QWEN_EYE, **_QWEN_IDS},
    ),
    "llava": (
        "Llava",
        {"model_type": "llama"},
        {"vision_config": {**_EYE, "model_type": "clip_vision_model"}, "image_token_index": IMAGE},
    ),
    "gemma3": (
        "Gemma3",
        {"query_pre_attn_scalar": 8, **_WINDOWED},
        {"vision_config": _EYE, "mm_tokens_per_image": 4, "image_token_index": IMAGE},
    ),
    "smolvlm": (
        "SmolVLM",
        {"model_type": "llama"},
        {"vision_config": _EYE, "scale_factor": 1, "image_token_id": IMAGE},
    ),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"vision_config": {**_EYE, "model_type": "pixtral"}, "image_token_index": IMAGE},
    ),
    "mllama": (
        "Mllama",
        {"model_type": "mllama_text_model", "num_hidden_layers": 3, "cross_attention_layers": [1]},
        {"vision_config": _MLLAMA_EYE},
    ),
    "voxtral": (
        "Voxtral",
        {"model_type": "llama"},
        {"audio_config": _EAR, "audio_token_id": IMAGE},
    ),
}


def tiny_composite(family: str = "llava", **changes: Any) -> PreTrainedModel:
    """In fp32, the same weights at every call, in training mode."""
    name, text, rest = COMPOSITES[family]
    text = {**sizes(), **text, **changes}
    if text.get("model_type") == "mllama_text_model":
        # Its config takes no dictionary.
        text = transformers.models.mllama.configuration_mllama.MllamaTextConfig(**text)
    config = getattr(transformers, f"{name}Config")(text_config=text, **rest)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).train()


def image_batch(family: str) -> tuple[Batch, dict[str, torch.Tensor]]:
    """One pair with an image in its prompt, and what a processor would give along."""
    prompt = [5, 47, IMAGE, IMAGE, IMAGE, IMAGE, 46, 6, 7]
    batch = pad_rows([[*prompt, 8, 9, 10], [*prompt, 11, 12]], [9, 9], "right")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 8, 8, generator=generator).expand(2, -1, -1, -1)
    types = (batch.input_ids == IMAGE).long()
    if family.startswith("qwen"):
        patches = torch.randn(16, 3 * 16, generator=generator).repeat(2, 1)
        grid = torch.tensor([[1, 4, 4]] * 2)
        return batch, {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}
    if family == "gemma3":
        return batch, {"pixel_values": pixels, "token_type_ids": types}
    return batch, {"pixel_values": pixels[:, None] if family == "smolvlm" else pixels}
