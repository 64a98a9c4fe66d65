"""Decoders with random weights at several sizes, and the FLOPs of a training step of one.

They are those of `hf_prefix_patch.flops`: what the result needs, whatever a kernel does beside
them. Their ratio is the ideal that a measured ratio is held against.
"""

import json
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from hf_prefix_patch import PrefixTree, flops
from hf_prefix_patch.flops import DecoderShape, Work, visible_pairs
from hf_prefix_patch.versions import CHECKPOINT_LAYERS


def _shape(layers: int, hidden: int, heads: int, kv: int, mlp: int, vocab: int, **rest: Any):
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "vocab_size": vocab,
    }
    return sizes | rest


SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "tiny": (LlamaConfig, _shape(2, 64, 4, 2, 128, 512)),
    "small": (LlamaConfig, _shape(6, 384, 6, 2, 1024, 8192)),
    # SmolLM2-135M, Qwen2.5-1.5B and Qwen2.5-7B; of the second also a 14th: layers and vocabulary
    "135m": (LlamaConfig, _shape(30, 576, 9, 3, 1536, 49152, tie_word_embeddings=True)),
    "1.5b": (Qwen2Config, _shape(28, 1536, 12, 2, 8960, 151936, tie_word_embeddings=True)),
    "1.5b/14": (Qwen2Config, _shape(2, 1536, 12, 2, 8960, 10852, tie_word_embeddings=True)),
    "7b": (Qwen2Config, _shape(28, 3584, 28, 4, 18944, 152064, tie_word_embeddings=False)),
}


def build_decoder(
    shape: str,
    device: str,
    dtype: torch.dtype,
    *,
    attention: str = "sdpa",
    head: bool = False,
    checkpointing: bool = False,
    frozen: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """A decoder stack with random weights, the same at every call, in training mode.

    Args:
        shape: a key of `SHAPES`.
        attention: transformers' `attn_implementation`.
        head: with an LM head, as a causal LM.
        checkpointing: recompute each layer in backward.
        frozen: gradients flow through the weights but not into them, as under LoRA.
        changes: entries of the config that replace those of the shape.
    """
    kind, sizes = SHAPES[shape]
    long_enough = {"max_position_embeddings": 2**18, "use_cache": False}
    config = kind(**sizes | long_enough | changes)
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if head else AutoModel
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    return set_up(model, checkpointing=checkpointing, frozen=frozen)


def set_up(model: PreTrainedModel, *, checkpointing: bool, frozen: bool) -> PreTrainedModel:
    """A model for training; arguments as of `build_decoder`."""
    if frozen:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    if checkpointing:
        getattr(model, CHECKPOINT_LAYERS)({"use_reentrant": False})
    return model.train()


@cache
def _shape_of(kind: type[PretrainedConfig], sizes: str) -> DecoderShape:
    return DecoderShape.of(kind.from_dict(json.loads(sizes)))


def row_pairs(lengths: list[int]) -> int:
    """Visible pairs of rows that each stand alone."""
    return int(visible_pairs(np.array(lengths), None).sum())


def tree_pairs(tree: PrefixTree) -> int:
    """Visible pairs of a packed row: `n` queries at the end of a path of `m` keys."""
    paths, own = np.array(tree.path_lengths), np.array(tree.segment_lengths)
    return int((visible_pairs(paths, None) - visible_pairs(paths - own, None)).sum())


def step_flops(
    config: PretrainedConfig,
    tokens: int,
    pairs: int,
    *,
    head_tokens: int = 0,
    **options: bool,
) -> int:
    """FLOPs of forward and backward of a decoder whose layers have no window.

    Args:
        tokens: that the decoder runs on, padding included where it does.
        pairs: visible (query, key) pairs of one layer and head.
        head_tokens: that the LM head projects.
        options: those of `hf_prefix_patch.flops.step_flops`.
    """
    shape = _shape_of(type(config), config.to_json_string(use_diff=False))
    return flops.step_flops(shape, Work(tokens, {None: pairs}, head_tokens), **options).total
