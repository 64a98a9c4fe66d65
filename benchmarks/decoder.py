"""Decoders with random weights at several sizes, and the arithmetic of a training step of one.

The FLOPs are those that the result needs, whatever a kernel does beside them: two for every weight
and token in the projections and the MLP, and in attention for every pair of a query and a key that
it may see. Their ratio is the ideal that a measured ratio is held against.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from hf_prefix_patch import PrefixTree


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
    # SmolLM2-135M, Qwen2.5-1.5B and Qwen2.5-7B
    "135m": (LlamaConfig, _shape(30, 576, 9, 3, 1536, 49152, tie_word_embeddings=True)),
    "1.5b": (Qwen2Config, _shape(28, 1536, 12, 2, 8960, 151936, tie_word_embeddings=True)),
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
    if frozen:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    if checkpointing:
        with warnings.catch_warnings():
            # Renamed in transformers 5.23, which takes the name that earlier ones have too.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def row_pairs(lengths: Iterable[int]) -> int:
    """Visible (query, key) pairs of rows that each stand alone."""
    return sum(n * (n + 1) // 2 for n in lengths)


def tree_pairs(tree: PrefixTree) -> int:
    """Visible (query, key) pairs of a packed row: `n` queries at the end of a path of `m` keys."""
    segments = zip(tree.segment_lengths, tree.path_lengths, strict=True)
    return sum(n * m - n * (n - 1) // 2 for n, m in segments)


def step_flops(
    config: PretrainedConfig,
    tokens: int,
    pairs: int,
    *,
    head_tokens: int = 0,
    checkpointing: bool = False,
    frozen: bool = False,
) -> int:
    """FLOPs of forward and backward.

    A matrix product with a weight costs its backward one product for the input and, unless frozen,
    one for the weight; the two of attention cost two each. Checkpointing repeats the decoder's
    forward. Norms, activations, rotary embeddings and biases are left out.

    Args:
        tokens: that the decoder runs on, padding included where it does.
        pairs: visible (query, key) pairs of one layer and head.
        head_tokens: that the LM head projects.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    keys = config.num_key_value_heads * head_dim
    weights = hidden * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    forward = 1 + checkpointing
    backward = 1 if frozen else 2
    linear = 2 * tokens * layers * weights * (forward + backward)
    attention = 2 * 2 * pairs * layers * queries * (forward + 2)
    return linear + attention + 2 * head_tokens * hidden * config.vocab_size * (1 + backward)
