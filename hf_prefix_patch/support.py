"""What cannot be shared: models refused at enable time, calls bypassed at run time."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix_patch.adapters import adapter_reason, config_depends_on_batch
from hf_prefix_patch.versions import check_loaded

SHARED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_RECURRENT_LAYER_TYPES = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}
_TOKENWISE_LAYER_TYPES = {"mlp", "moe"}  # layers without attention
# Method of embeddings whose positions depend on which ids are padding, as RoBERTa's.
_COUNTS_IDS = "create_position_ids_from_input_ids"

REFUSED = "prefix sharing refused: "
CACHE_BY_DEFAULT = "key/value cache by default"

ADVICE = {
    CACHE_BY_DEFAULT: "pass use_cache=False, or set it in the model's config, which asks for a "
    "cache outside training",
    "key/value cache": "pass use_cache=False, unless the call generates",
    "inputs_embeds": "pass input_ids, which sharing compares; prompt learning of PEFT cannot be "
    "shared",
    "attention mask that is not [rows, length]": "pass the padding mask, ones and zeros",
    "attention mask with holes": "remove the tokens that are masked inside of rows",
    "position_ids that are not [rows, length]": "pass integers of the shape of input_ids",
    "position_ids that are not integers": "pass integers of the shape of input_ids",
    "several documents in a row": "give each document a row of its own, with packing=False and "
    "padding_free=False",
    "output_attentions": "ask for attention weights in a separate call",
    "NEFTune": "set neftune_noise_alpha=None",
}
"""What to do about calls that are bypassed, by reason; docs/limits.md has all."""

# Inputs of a decoder stack that sharing understands, or that do not change its hidden states.
_KNOWN_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"}
_KNOWN_INPUTS |= {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
_KNOWN_INPUTS |= {"return_dict", "labels", "shift_labels", "num_items_in_batch"}
# What trainers and heads hand a decoder stack although it is for the head or the loss. A stack that
# has a parameter of this name reads it (Gemma 4 computes some layers for `logits_to_keep` alone).
PASSED_THROUGH = {"logits_to_keep", "margin"}

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What composite models are told of their tokens: whether they stand for text or for an image."""


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
        raise refusal(name, "is an encoder-decoder", "sharing needs a decoder-only model")
    if getattr(config, "num_hidden_layers", None) is None:
        raise refusal(
            name,
            "is not one stack of layers (its config has no num_hidden_layers)",
            "sharing needs a single decoder",
        )
    known = SHARED_LAYER_TYPES | _RECURRENT_LAYER_TYPES | _TOKENWISE_LAYER_TYPES
    others = sorted(set(layer_types(config)) - known)
    if others:
        raise refusal(
            name, f"has layers of type {others}", f"sharing needs {sorted(SHARED_LAYER_TYPES)}"
        )
    # Hybrids do not say so, whether they do or not; of those that can follow the tree all do.
    if not (is_recurrent(decoder) or getattr(decoder, "_supports_attention_backend", False)):
        raise refusal(
            name,
            "does not call its attention through transformers' attention registry "
            "(_supports_attention_backend is false)",
            "sharing needs that; try a newer transformers",
        )
    if not _is_causal(config) or any(
        getattr(module, "is_causal", True) is False for module in decoder.modules()
    ):
        raise refusal(name, "uses bidirectional attention", "sharing needs causal attention")
    called = _called_inside(model)
    if called:
        raise refusal(
            name,
            f"has a head that calls {called} inside {type(model.base_model).__name__}",
            "sharing hooks the whole stack, which would never be called",
        )
    counting = next((m for m in decoder.modules() if hasattr(m, _COUNTS_IDS)), None)
    if counting is not None:
        raise refusal(
            name,
            f"counts positions from padding ids ({type(counting).__name__}), not from columns",
            "sharing needs position_ids that begin at zero",
        )
    unsloth = next((m for m in model.modules() if _is_unsloth(m)), None)
    if unsloth is not None:
        raise refusal(
            name,
            f"was patched by Unsloth ({type(unsloth).__name__}), whose fast forward drops the "
            "attention mask",
            "load it with transformers' own classes, in a process that does not import unsloth",
        )
    if any(is_bitsandbytes(m) and _outlier_threshold(m) > 0 for m in model.modules()):
        raise refusal(
            name,
            "has 8-bit layers that pick outlier columns from all tokens of a call, padding "
            "included, so that a row's results depend on the rows beside it",
            "load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in "
            "4 bits",
        )
    if has_neftune(model):
        raise refusal(
            name,
            "has NEFTune noise on its embeddings, whose size depends on the row length",
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
                "use LoRA or another method that changes weights",
            )
        if config_depends_on_batch(config):
            raise refusal(
                f"adapter {adapter!r}",
                f"({type(config).__name__}) depends on the rows of the batch, not on tokens alone",
                "use LoRA or another method that treats all tokens alike",
            )
        if getattr(config, "alora_invocation_tokens", None) is not None:
            raise refusal(
                f"adapter {adapter!r}",
                "is an activated LoRA (aLoRA), which switches on inside each row",
                "set alora_invocation_tokens=None",
            )


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether layers carry a state from token to token beside attention."""
    stateful = getattr(model, "_is_stateful", False)
    return stateful or not _RECURRENT_LAYER_TYPES.isdisjoint(layer_types(model.config))


def layer_types(config: Any) -> list[str]:
    """Type of each decoder layer, from what the config says."""
    named = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if named:
        return ["full_attention" if kind == "attention" else kind for kind in named]
    kind = "sliding_attention" if sliding_window(config) else "full_attention"
    return [kind] * config.num_hidden_layers


def sliding_window(config: Any) -> int | None:
    """Keys that a query of a sliding layer sees, its own included."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def layer_slides(config: Any, layer: int) -> bool:
    """Whether a decoder layer has a sliding window."""
    types = layer_types(config)
    return layer < len(types) and types[layer] == "sliding_attention"


def is_attention(module: nn.Module) -> bool:
    """Whether a module is named for attention, or calls transformers' attention registry (as the
    MLA layers of LongCat do)."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    called = getattr(code, "co_names", ())
    return "attention" in type(module).__name__.lower() or "ALL_ATTENTION_FUNCTIONS" in called


def has_neftune(model: PreTrainedModel) -> bool:
    """Whether the embeddings carry NEFTune's mark (transformers sets it when training begins)."""
    return getattr(model.get_input_embeddings(), "neftune_noise_alpha", None) is not None


def has_sinks(backbone: nn.Module) -> bool:
    """Whether attention layers have sinks, a learnt score beside those of the keys."""
    return any(getattr(module, "sinks", None) is not None for module in backbone.modules())


def has_experts(config: Any) -> bool:
    """Whether the model routes tokens to experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a layer has weights quantised by bitsandbytes."""
    return any(cls.__module__.partition(".")[0] == "bitsandbytes" for cls in type(module).__mro__)


def rope_depends_on_length(config: Any) -> bool:
    """Whether the rotary frequencies depend on the longest position of the call."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    entries = [parameters or {}, *(x for x in (parameters or {}).values() if isinstance(x, dict))]
    kinds = {str(entry.get("rope_type", entry.get("type"))) for entry in entries}
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def bypass_reason(
    backbone: PreTrainedModel, inputs: dict[str, Any], cache_by_default: bool = True
) -> str | None:
    """Why this call must run as it is; None if its rows can be packed.

    Args:
        backbone: the decoder stack, or the composite around it.
        inputs: its keyword arguments, `input_ids` `[R, L]` among them.
        cache_by_default: whether a caller outside training who does not say so may go on from the
            cache that the config asks for.
    """
    return next(_bypass_reasons(backbone, inputs, cache_by_default), None)


def _bypass_reasons(
    backbone: PreTrainedModel, inputs: dict[str, Any], cache_by_default: bool
) -> Iterator[str]:
    config, ids = backbone.config.get_text_config(decoder=True), inputs.get("input_ids")
    if getattr(backbone, "_is_replica", False):
        yield "DataParallel, which parts the rows of a batch; use DistributedDataParallel"
    if ids is None or inputs.get("inputs_embeds") is not None:
        yield "inputs_embeds"
        return
    if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
        yield "key/value cache"
    # In training nobody reads a cache; elsewhere the caller may go on from it.
    by_default = inputs.get("use_cache") is None and getattr(config, "use_cache", False)
    if by_default and cache_by_default and not backbone.training:
        yield CACHE_BY_DEFAULT
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        yield "attention mask that is not [rows, length]"
    if positions is not None and positions.shape not in (ids.shape, ids[:1].shape):
        yield "position_ids that are not [rows, length]"
    elif positions is not None and positions.is_floating_point():
        yield "position_ids that are not integers"
    elif mask is None and positions is not None and bool((positions.diff(dim=-1) != 1).any()):
        yield "several documents in a row"
    asked = inputs.get("output_attentions")
    if getattr(config, "output_attentions", False) if asked is None else asked:
        yield "output_attentions"
    known = _KNOWN_INPUTS
    if config is not backbone.config:
        known = known.union(TOKEN_TYPES, _options(backbone, inputs))
    for name, x in inputs.items():
        if name not in known and x is not None and not passes_through(backbone, name, x):
            yield f"input {name!r}"
    if not _is_causal(config):
        yield "bidirectional attention"
    if backbone.training and has_neftune(backbone):
        yield "NEFTune"
    adapters = adapter_reason(backbone)
    if adapters is not None:
        yield adapters
    if _context_parallel():
        yield "context parallel"


def passes_through(stack: PreTrainedModel, name: str, value: Any) -> bool:
    """Whether an argument is for the head or the loss, and this stack does not read it."""
    reads = name in inspect.signature(stack.forward).parameters
    keeps_all = isinstance(value, int) and value == 0  # what heads of Gemma 4 hand on by default
    return name in PASSED_THROUGH and (not reads or keeps_all)


def _options(composite: PreTrainedModel, inputs: dict[str, Any]) -> set[str]:
    """Inputs that say how a composite treats images, and hold none; others it would hand on."""
    own = inspect.signature(composite.forward).parameters.keys() & inputs.keys()
    lists = {name: x if isinstance(x, list | tuple) else [x] for name, x in inputs.items()}
    return {name for name in own if all(isinstance(x, int | float | str) for x in lists[name])}


def _is_causal(config: Any) -> bool:
    bidirectional = getattr(config, "use_bidirectional_attention", False)
    # "vision" is for image tokens, and calls with such inputs are bypassed.
    causal = not bidirectional or bidirectional == "vision"
    return getattr(config, "is_causal", True) is not False and causal


def _called_inside(model: PreTrainedModel) -> list[str]:
    """Parts of the stack that the head's forward names, as OPT's does with the decoder."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    parts = dict(model.base_model.named_children()) if model.base_model is not model else {}
    return sorted(parts.keys() & set(getattr(code, "co_names", ())))


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


def _outlier_threshold(module: nn.Module) -> float:
    """From which activation on an 8-bit layer of bitsandbytes takes a column out."""
    return getattr(getattr(module, "state", None), "threshold", 0.0) or 0.0


def _context_parallel() -> bool:
    """Whether accelerate splits rows over processes (context or sequence parallelism)."""
    state = sys.modules.get("accelerate.state")
    shared = state.AcceleratorState._shared_state if state else {}
    plan = shared.get("parallelism_config")
    return any((getattr(plan, name, None) or 1) > 1 for name in ("cp_size", "sp_size"))


def refusal(what: str, has: str, need: str) -> NotImplementedError:
    """What is refused, why, and what sharing needs or the user can do."""
    return NotImplementedError(f"{REFUSED}{what} {has}; {need}")
