"""FLOPs of a training step: what of a model decides them, and what of a batch.

Counted is what the result needs: two FLOPs for every weight that a token is multiplied with, and in
attention two for every entry of a query head and of a value head, for every pair of a query and a
key that it may see (Kaplan et al., arXiv 2001.08361, section 2.1; there all pairs are counted).
Norms, activations, rotary embeddings, biases, adapters and the states of recurrent layers are left
out: they are small, and most grow with the tokens as the weights do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from hf_prefix_patch.composite import decoder_of
from hf_prefix_patch.features import (
    expert_counts,
    is_attention,
    is_classifier,
    is_recurrent,
    layer_slides,
    sliding_window,
)
from hf_prefix_patch.wrappers import backbone_of

Window = int | None
"""Keys that a query sees at most, its own included; None for all before it."""

_EXPERTS_USED = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_k",
    "moe_topk",
    "moe_top_k",
)


@dataclass(frozen=True)
class DecoderShape:
    """What of a model decides the FLOPs of a step.

    Attributes:
        name: its type, as configs name it.
        weights: entries of the matrices that a token meets in the decoder stack; of experts, of
            those that it is routed to.
        heads: for each window that layers have, query heads times the sizes of a query and a value
            head, summed over these layers.
        head: entries of the LM head's matrix.
    """

    name: str
    weights: int
    heads: Mapping[Window, int]
    head: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> DecoderShape:
        """Read off the modules of a model that is built without memory for its weights.

        Raises:
            ValueError: no causal LM of transformers has this config, or one whose attention layers
                or experts are not recognised.
        """
        return cls.of_model(empty_model(config))

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> DecoderShape:
        """The same of a model that has been built, as by `empty_model`.

        Raises:
            ValueError: its attention layers or experts are not recognised.
        """
        stack = decoder_of(backbone_of(model))
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return cls(
            name=str(stack.config.model_type),
            weights=round(sum(_used_weights(stack))),
            heads=_heads(stack),
            head=0 if head is None else head.weight.numel(),
        )


@dataclass(frozen=True)
class Work:
    """What a forward pass runs on, of one batch or summed over many.

    Attributes:
        tokens: that the decoder runs on, padding included where it does.
        pairs: for each window of the model, pairs of a query and a key that attention computes in
            one layer and head.
        head_tokens: that the LM head projects.
    """

    tokens: int
    pairs: Mapping[Window, int]
    head_tokens: int = 0


class Flops(NamedTuple):
    """By what they are spent on."""

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


def step_flops(
    shape: DecoderShape,
    work: Work,
    *,
    checkpointing: bool = False,
    frozen: bool = False,
    reference: bool = False,
    head_again: bool = False,
) -> Flops:
    """FLOPs of forward and backward.

    A matrix product with a weight costs its backward one product for the input and, unless frozen,
    one for the weight; the two of attention cost two each. Checkpointing repeats the decoder's
    forward.

    Args:
        reference: a forward pass of a reference model of the same shape beside it.
        head_again: logits are computed again in backward, as TRL 1.16 does in chunks.
    """
    forward = 1 + checkpointing + reference
    backward = 1 if frozen else 2
    scores = sum(shape.heads[window] * work.pairs[window] for window in shape.heads)
    return Flops(
        linear=2 * work.tokens * shape.weights * (forward + backward),
        attention=2 * scores * (forward + 2),
        head=2 * work.head_tokens * shape.head * (1 + reference + head_again + backward),
    )


def visible_pairs(lengths: np.ndarray, window: Window) -> np.ndarray:
    """Pairs of a query and a key that it may see, in causal rows of these lengths."""
    n = lengths.astype(np.int64)
    if window is None:
        window = np.iinfo(np.int64).max
    within: np.ndarray = np.minimum(n, window)
    pairs: np.ndarray = within * (within + 1) // 2 + (n - within) * window
    return pairs


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal LM, the model around one, or a classifier if the config names one, without memory
    for its weights.

    Raises:
        ValueError: there is none for this config, or it cannot be built.
    """
    known = [
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    ]
    for mapping, auto in known if is_classifier(config) else known[1:]:
        if type(config) in mapping:
            try:
                with torch.device("meta"):
                    return auto.from_config(config)  # type: ignore
            except Exception as error:  # of whatever a model does with its config
                raise ValueError(
                    f"no {config.model_type!r} model can be built from the config "
                    f"({type(error).__name__}: {error}); repair it, or leave it out to compare "
                    "tokens alone"
                ) from error
    raise ValueError(
        f"the config is one of {config.model_type!r}, but must be that of a causal LM of "
        "transformers; give the config.json of the model to be trained"
    )


def _used_weights(stack: nn.Module) -> Iterable[float]:
    """Entries of each matrix that a token meets; of routed experts, the part that it meets."""
    looked_up = {
        id(weight)
        for module in stack.modules()
        if isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    for name, weight in stack.named_parameters():
        *path, last = name.split(".")
        if weight.ndim > 1 and id(weight) not in looked_up and not last.endswith("bias"):
            routed = _is_routed(stack.config, path, weight)
            yield weight.numel() * (_experts_used(stack, name) if routed else 1)


def _is_routed(config: Any, path: list[str], weight: nn.Parameter) -> bool:
    """Whether a matrix is, or has in it, one for each expert; a router is met by every token."""
    if "router" in path:
        return False
    return "experts" in path or (weight.ndim == 3 and len(weight) in expert_counts(config))


def _experts_used(stack: Any, name: str) -> float:
    """The part of a layer's routed experts that a token meets."""
    before, _, after = f".{name}".rpartition(".experts.")
    first = after.split(".")[0]
    if before and first.isdigit():
        count = len(stack.get_submodule(f"{before}.experts".removeprefix(".")))
    else:
        count = stack.get_parameter(name).shape[0]
    used = next((u for n in _EXPERTS_USED if (u := getattr(stack.config, n, None))), None)
    if used is None:
        raise ValueError(
            f"{type(stack).__name__} has experts, but its config none of {_EXPERTS_USED}, which "
            "say how many a token meets; no FLOPs can be counted for it"
        )
    return float(used / count)


def _heads(stack: Any) -> dict[Window, int]:
    """See `DecoderShape.heads`; the attention module of a layer is the outermost of its number."""
    config, found, layers = stack.config, dict[Window, int](), set()
    for module in stack.modules():
        layer = getattr(module, "layer_idx", None)
        if not is_attention(module) or layer is None or layer in layers:
            continue
        layers.add(layer)
        count = config.num_attention_heads
        size = getattr(module, "head_dim", None) or config.hidden_size // count
        query = getattr(module, "qk_head_dim", None) or size
        value = getattr(module, "v_head_dim", None) or size
        window = sliding_window(config) if layer_slides(config, layer) else None
        found[window] = found.get(window, 0) + count * (query + value)
    if not found and not is_recurrent(stack):
        raise ValueError(
            f"no attention layer with a layer_idx was found in {type(stack).__name__}; no FLOPs "
            "can be counted for it"
        )
    return found
