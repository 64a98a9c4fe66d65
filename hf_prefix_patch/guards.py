"""Errors of a call that would be obscure where they came up, said before they do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix_patch.features import is_attention, vocabulary_size
from hf_prefix_patch.plans import ROW_INPUTS, Plan


def check_tensors(inputs: Mapping[str, Any]) -> None:
    """Refuse rows, a mask or positions that are there and no tensors. Masks of other kinds, such as
    one for each type of layer, are the model's to read."""
    for name in ROW_INPUTS:
        x = inputs.get(name)
        refused: Any = object if name == "input_ids" else Sequence | np.ndarray
        if x is not None and not isinstance(x, Tensor) and isinstance(x, refused):
            raise TypeError(
                f"{name} is a {type(x).__name__}, but must be a tensor [R, L] of integers; pass "
                "torch.tensor of rows padded to one length"
            )


def check_embedded(decoder: PreTrainedModel, plan: Plan, positions: int | None) -> None:
    """Refuse ids and positions without an embedding: an IndexError deep in the model, and on a CUDA
    device an assertion that no later call survives.

    Args:
        decoder: the stack that embeds them.
        plan: of the call, which knows the largest ones from the host.
        positions: as `learned_positions` of the decoder.
    """
    vocabulary, name = vocabulary_size(decoder), type(decoder).__name__
    if vocabulary is not None and plan.largest_id >= vocabulary:
        raise ValueError(
            f"input_ids hold the id {plan.largest_id}, but {name} has embeddings for ids from 0 to "
            f"{vocabulary - 1} only; use the tokenizer of this model, or call "
            "model.resize_token_embeddings(len(tokenizer)) if it has more tokens"
        )
    if positions is not None and plan.largest_position >= positions:
        raise ValueError(
            f"a row has a token at position {plan.largest_position}, but {name} has embeddings for "
            f"positions from 0 to {positions - 1} only; cut rows with max_length={positions}, or "
            "leave longer ones out"
        )


def not_packed(module: nn.Module, shape: Sequence[int]) -> RuntimeError:
    """Of a packed row something made rows, which layers broadcast without an error."""
    return RuntimeError(
        f"{type(module).__name__} has a tensor of shape {list(shape)} in a call on a packed row, "
        "which must begin with 1; something between the layers, such as a hook, has added a value "
        "for each row: let it add one for all rows, or take it off while sharing is enabled"
    )


def ask_in_backward(decoder: PreTrainedModel, output: Tensor, hook: Callable[..., Any]) -> None:
    """When backward begins, say why layers that are about to run again cannot.

    Args:
        decoder: the stack that was called.
        output: its hidden states.
        hook: forward hook that the stack has while it is patched.
    """
    reference = weakref.ref(decoder)

    def check(_: Tensor) -> None:
        stack = reference()
        if stack is None or hook in stack._forward_hooks.values():
            return
        # Recurrent layers alone have all they need in the arguments of the call.
        attends = any(map(is_attention, stack.modules()))
        if attends and any(getattr(m, "gradient_checkpointing", False) for m in stack.modules()):
            raise RuntimeError(
                f"prefix sharing of {type(stack).__name__} was removed between a forward and its "
                "backward, but with gradient checkpointing the layers run again in backward and "
                "need it; call backward first, and remove the patch or leave its with block "
                "afterwards"
            )

    if output.requires_grad:
        output.register_hook(check)  # type: ignore[no-untyped-call]
