"""Which backend serves a model in the state that it is called in, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl
from transformers import PreTrainedModel

from hf_prefix_patch.attention import BACKENDS
from hf_prefix_patch.backends.base import Backend, Needs, autocast_dtype
from hf_prefix_patch.backends.flex import FLEX
from hf_prefix_patch.features import (
    drops_attention,
    flash_dtype,
    has_sinks,
    is_attention,
    layer_types,
    sliding_window,
)
from hf_prefix_patch.kernel_check import kernel_fault
from hf_prefix_patch.notices import warn_caller
from hf_prefix_patch.support import REFUSED
from hf_prefix_patch.wrappers import device_of

# What configs call the dropout of attention weights, for layers that ask them at each call.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")

State = tuple[torch.device, torch.dtype, torch.dtype | None]


@dataclass(frozen=True)
class Selection:
    """The backend that serves a model, and by name why each other one was passed over."""

    backend: Backend
    needs: Needs
    passed_over: dict[str, str]


def select(name: str, needs: Needs, model: str) -> Selection:
    """Pick a backend.

    Args:
        name: `"auto"` or the name of a backend.
        needs: of the model in the state that it is called in.
        model: its class, for messages.

    Raises:
        NotImplementedError: the named backend cannot serve these needs.
        RuntimeError: its kernel, or with `"auto"` that of every backend, computes wrong results on
            this device.
    """
    auto = name == "auto"
    against = {x.name: unserved(x, needs) for x in BACKENDS.values()}
    if auto:
        against[FLEX.name] = against[FLEX.name] or 'it is taken by name only (backend="flex")'
    fault = None
    for backend in BACKENDS.values() if auto else [BACKENDS[name]]:
        if against[backend.name] is not None:
            continue
        fault = against[backend.name] = kernel_fault(backend, needs)
        if fault is None:
            instead = f"{backend.name} comes first" if auto else f"{name} was asked for"
            others = {x: reason or instead for x, reason in against.items() if x != backend.name}
            return Selection(backend, needs, others)
        if auto:
            warn_caller(
                f"prefix sharing does not use its backend {backend.name!r}: {fault}; the next one "
                "that serves is taken, and backend=... picks one by name"
            )
    if not auto:
        can = [x for x, reason in against.items() if reason is None]
        raise (RuntimeError if fault else NotImplementedError)(
            f"{REFUSED}backend {name!r} cannot serve this {model}: "
            f"{against[name]}; these can: {can}, and backend='auto' picks one"
        )
    raise RuntimeError(
        f"{REFUSED}no backend of {list(against)} computes right results for "
        f"this {model}: {against}; run it unpatched, or on another device or release of torch"
    )


def unserved(backend: Backend, needs: Needs) -> str | None:
    """Why the backend cannot serve these needs; None if it can."""
    missing = sorted(needs.features - backend.features)
    if missing:
        return f"it has no {' or '.join(missing)}, which this model uses"
    return backend.unserved(needs)


class Seen:
    """Device and dtype that attention computes in, as a model's weights tell and calls then show.

    Wrappers change both for the time of a call: mixed precision of FSDP, weights that are offloaded
    between calls. A call runs with what is known when it begins; what it shows serves the next. One
    is kept for each state that weights and autocast are in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    @classmethod
    def of(cls, state: State) -> Seen:
        """What weights and autocast tell before any call."""
        device, dtype, autocast = state
        return cls(device, autocast or dtype)

    def note(self, value: Tensor) -> None:
        """Look at values of attention: unlike queries and keys they come straight from weights,
        where norms and rotary angles in fp32 do not show."""
        # Layers may be spread over devices of one type; one backend serves them all.
        if value.device.type != self.device.type:
            self.device = value.device
        autocast = autocast_dtype(value.device) if value.dtype == torch.float32 else None
        self.dtype = autocast or value.dtype


@dataclass(frozen=True)
class Structure:
    """What of a model's needs does not change from call to call.

    Attributes:
        head_dims: sizes of its query, key and value heads.
        slides: whether layers have a sliding window: both, where some do.
        sinks: whether layers have attention sinks.
        drops: whether layers have a dropout of attention weights.
    """

    head_dims: frozenset[int]
    slides: frozenset[bool]
    sinks: bool
    drops: bool


def structure_of(backbone: PreTrainedModel) -> Structure:
    """Read off the modules and the layer types of a decoder stack."""
    kinds = layer_types(backbone.config)
    return Structure(
        head_dims=_head_dims(backbone),
        slides=frozenset(kind == "sliding_attention" for kind in kinds),
        sinks=has_sinks(backbone),
        drops=drops_attention(backbone),
    )


def state_of(backbone: PreTrainedModel) -> State:
    """Device, the dtype that the weights say attention computes in, and that of autocast if on."""
    device, dtype = device_of(backbone), backbone.dtype
    if dtype == torch.float32:
        dtype = flash_dtype(backbone.config) or dtype
    return device, dtype, autocast_dtype(device)


def needs_of(backbone: PreTrainedModel, structure: Structure, seen: Seen | None = None) -> Needs:
    """What the attention of a decoder stack needs in the present state of model and autocast.

    Args:
        seen: what calls in this state have shown, if there were any.
    """
    seen = seen or Seen.of(state_of(backbone))
    config = backbone.config
    windows = {sliding_window(config) if slides else None for slides in structure.slides}
    features = {
        "window": windows != {None},
        "softcap": getattr(config, "attn_logit_softcapping", None) is not None,
        "sinks": structure.sinks,
        "dropout": structure.drops or any(getattr(config, name, None) for name in _DROPOUTS),
    }
    return Needs(
        device=seen.device,
        dtype=seen.dtype,
        implementation=config._attn_implementation,
        head_dims=structure.head_dims,
        windows=frozenset(windows),
        features=frozenset(name for name, used in features.items() if used),
        kernels=_kernels(),
        flash_impl=current_flash_attention_impl(),
    )


def _kernels() -> frozenset[str]:
    cuda: Any = torch.backends.cuda
    switches = {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return frozenset(name for name, on in switches.items() if on)


def _head_dims(backbone: PreTrainedModel) -> frozenset[int]:
    """Sizes of the query, key and value heads, as the attention modules or the config say."""
    names = ("head_dim", "qk_head_dim", "v_head_dim")
    found = {
        size
        for module in backbone.modules()
        if is_attention(module)
        for name in names
        if isinstance(size := getattr(module, name, None), int)
    }
    if not found:
        config = backbone.config
        heads = getattr(config, "num_attention_heads", None)  # none in a stack without attention
        found = {config.hidden_size // heads} if heads else set()
    return frozenset(found)
