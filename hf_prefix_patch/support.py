"""What is refused at enable time: models and PEFT methods that cannot be shared exactly."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.adapters import config_depends_on_batch
from hf_prefix_patch.features import (
    RECURRENT_LAYER_TYPES,
    SHARED_LAYER_TYPES,
    TOKENWISE_LAYER_TYPES,
    has_neftune,
    is_bitsandbytes,
    is_causal,
    is_known_attention,
    is_recurrent,
    layer_types,
    outlier_threshold,
)
from hf_prefix_patch.versions import check_loaded

# Method of embeddings whose positions depend on which ids are padding, as RoBERTa's.
_COUNTS_IDS = "create_position_ids_from_input_ids"

REFUSED = "prefix sharing refused: "


def check_model(model: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Refuse a model whose packed row could differ from its rows.

    Args:
        model: as the user has it.
        decoder: the stack of it that runs on the packed row.

    Raises:
        NotImplementedError: names the feature and what to do about it.
    """
    name, config = type(model).__name__, decoder.config
    if model.config.is_encoder_decoder or config.is_encoder_decoder:
        raise refusal(name, "is an encoder-decoder", "a decoder-only model")
    if getattr(config, "num_hidden_layers", None) is None:
        raise refusal(
            name,
            "is not one stack of layers (its config has no num_hidden_layers)",
            "a single decoder",
        )
    known = SHARED_LAYER_TYPES | RECURRENT_LAYER_TYPES | TOKENWISE_LAYER_TYPES
    others = sorted(set(layer_types(config)) - known)
    if others:
        raise refusal(name, f"has layers of type {others}", f"{sorted(SHARED_LAYER_TYPES)}")
    # Hybrids do not say so, whether they do or not; of those that can follow the tree all do.
    if not (is_recurrent(decoder) or getattr(decoder, "_supports_attention_backend", False)):
        raise refusal(
            name,
            "does not call its attention through transformers' attention registry "
            "(_supports_attention_backend is false)",
            "that",
            "try a newer transformers, or run it unpatched",
        )
    if not is_causal(config) or any(
        getattr(module, "is_causal", True) is False for module in decoder.modules()
    ):
        raise refusal(name, "uses bidirectional attention", "causal attention")
    if not is_known_attention(config._attn_implementation):
        raise refusal(
            name,
            f"attends by {config._attn_implementation!r}, a function that was registered, or that "
            "calls another one than transformers' own",
            "one of transformers' own, in whose place shared attention stands",
            "load it with attn_implementation='sdpa', if the function computes the same",
        )
    called = _called_inside(model)
    if called:
        raise refusal(
            name,
            f"has a head that calls {called} inside {type(model.base_model).__name__}",
            "the whole stack to be called, which it hooks",
        )
    counting = next((m for m in decoder.modules() if hasattr(m, _COUNTS_IDS)), None)
    if counting is not None:
        raise refusal(
            name,
            f"counts positions from padding ids ({type(counting).__name__}), not from columns",
            "position_ids that begin at zero",
        )
    unsloth = next((m for m in model.modules() if _is_unsloth(m)), None)
    if unsloth is not None:
        raise refusal(
            name,
            f"was patched by Unsloth ({type(unsloth).__name__}), whose fast forward drops the "
            "attention mask",
            "transformers' own forward",
            "load it with transformers' own classes, in a process that does not import unsloth",
        )
    if any(is_bitsandbytes(m) and outlier_threshold(m) > 0 for m in model.modules()):
        raise refusal(
            name,
            "has 8-bit layers that pick outlier columns from all tokens of a call, padding "
            "included, so that a row's results depend on the rows beside it",
            "layers that treat each token by itself",
            "load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in "
            "4 bits",
        )
    pooler = getattr(decoder, "pooler", None)
    if pooler is not None:
        raise refusal(
            name,
            f"has a stack that pools rows itself ({type(pooler).__name__}), and a packed row is "
            "one row",
            "a stack that returns something for each token",
            "use a class of the family that makes no such pool, or run it unpatched",
        )
    of_batch = next((m for m in decoder.modules() if _counts_tokens(m)), None)
    if of_batch is not None:
        raise refusal(
            name,
            f"has layers ({type(of_batch).__name__}) that reckon with how often tokens come in a "
            "batch, padding included",
            "layers that treat each token by itself",
            "take scale_grad_by_freq back or exchange the layer, or run it unpatched",
        )
    if has_neftune(model):
        raise refusal(
            name,
            "has NEFTune noise on its embeddings, whose size depends on the row length",
            "equal tokens to be embedded alike",
            "set neftune_noise_alpha=None",
        )


def check_peft(peft_model: Any) -> None:
    """Refuse PEFT methods that act on positions of a row, or on rows.

    Raises:
        ImportError: a PEFT that is too old.
        NotImplementedError: prompt learning, aLoRA, and others that depend on the batch.
    """
    check_loaded("peft")
    for adapter, config in peft_model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise refusal(
                f"adapter {adapter!r}",
                f"is prompt learning ({type(config).__name__}), which adds virtual tokens to every "
                "row",
                "rows as they are given",
                "use LoRA or another method that changes weights",
            )
        if config_depends_on_batch(config):
            raise refusal(
                f"adapter {adapter!r}",
                f"({type(config).__name__}) depends on the rows of the batch, not on tokens alone",
                "all tokens to be treated alike",
                "use LoRA or another method that does so",
            )
        if getattr(config, "alora_invocation_tokens", None) is not None:
            raise refusal(
                f"adapter {adapter!r}",
                "is an activated LoRA (aLoRA), which switches on inside each row",
                "an adapter that is on throughout",
                "set alora_invocation_tokens=None",
            )


def _called_inside(model: PreTrainedModel) -> list[str]:
    """Parts of the stack that the head's forward names, as OPT's does with the decoder."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    parts = dict(model.base_model.named_children()) if model.base_model is not model else {}
    return sorted(parts.keys() & set(getattr(code, "co_names", ())))


def _counts_tokens(module: nn.Module) -> bool:
    """Whether a layer's output, or its gradient, depends on the other tokens of a call."""
    by_frequency = isinstance(module, nn.Embedding) and module.scale_grad_by_freq
    return by_frequency or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _is_unsloth(module: nn.Module) -> bool:
    """Whether Unsloth wrote the module's class (it generates some into files of its own), or the
    forward of class or instance, under whatever decorators."""
    functions: list[Any] = [type(module), type(module).forward, module.forward]
    while functions:
        function = functions.pop()
        if any(x.startswith("unsloth") for x in str(function.__module__).split(".")):
            return True
        inner = (getattr(function, name, None) for name in ("func", "__wrapped__", "__func__"))
        functions += [x for x in inner if x is not None]
    return False


def refusal(what: str, has: str, need: str, todo: str = "run it unpatched") -> NotImplementedError:
    """What is refused and why, what sharing needs, and what the user can do."""
    return NotImplementedError(f"{REFUSED}{what} {has}; sharing needs {need}; {todo}")
