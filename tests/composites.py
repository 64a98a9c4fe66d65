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
    "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]],
    "intermediate_layers_indices": [0],
}
_EAR = {**_SMALL, "intermediate_size": 32, "num_mel_bins": 8, "max_source_positions": 8}

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
        {
            "vision_config": {**_EYE, "model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
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
        {
            "vision_config": {**_EYE, "model_type": "pixtral"},
            "image_token_index": IMAGE,
            "spatial_merge_size": 1,
        },
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


def image_batch(family: str, *pictures: tuple[int, ...]) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Rows that begin alike but for their images, and what a processor would give along.

    Args:
        pictures: numbers of the images of each row; one image in both of two rows, if not given.
    """
    pictures = pictures or ((0,), (0,))
    rows, lengths = [], []
    for row, images in enumerate(pictures):
        prompt = [5, *[47, IMAGE, IMAGE, IMAGE, IMAGE, 46] * len(images), 6, 7]
        answer = [8 + 4 * row + i for i in range(3 if row % 2 == 0 else 2)]
        rows.append(prompt + answer)
        lengths.append(len(prompt))
    batch = pad_rows(rows, lengths, "right")
    return batch, _processed(family, pictures, (batch.input_ids == IMAGE).long())


def _processed(
    family: str, pictures: tuple[tuple[int, ...], ...], types: torch.Tensor
) -> dict[str, torch.Tensor]:
    shown = [number for images in pictures for number in images]
    if family == "voxtral":
        return {"input_features": torch.stack([_noise(number, 8, 16) for number in shown])}
    if family.startswith("qwen"):
        patches = torch.cat([_noise(number, 16, 3 * 16) for number in shown])
        grid = torch.tensor([[1, 4, 4]] * len(shown))
        return {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}
    if family == "smolvlm":  # a row each; images of zeros stand for none
        pixels = torch.zeros(len(pictures), max(map(len, pictures)), 3, 8, 8)
        for row, images in enumerate(pictures):
            for i, number in enumerate(images):
                pixels[row, i] = _noise(number, 3, 8, 8)
        return {"pixel_values": pixels}
    pixels = {"pixel_values": torch.stack([_noise(number, 3, 8, 8) for number in shown])}
    if family == "mistral3":
        return {**pixels, "image_sizes": torch.tensor([[8, 8]] * len(shown))}
    if family == "mllama":  # rows of images of tiles
        ones = torch.ones(len(pictures), 1, dtype=torch.long)
        return {
            "pixel_values": pixels["pixel_values"].view(len(pictures), 1, 1, 3, 8, 8),
            "aspect_ratio_ids": ones,
            "aspect_ratio_mask": ones[..., None],
            "cross_attention_mask": ones[..., None, None].expand(-1, types.shape[1], -1, -1),
        }
    return {**pixels, "token_type_ids": types} if family == "gemma3" else pixels


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
