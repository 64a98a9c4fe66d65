"""The attention function that transformers calls, and the table of backends behind it.

A call that carries a backend and what it planned for a `PrefixTree` runs shared attention on the
packed row; any other call runs the implementation that the model's own config names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_prefix_patch.backends.base import Backend, autocast_dtype
from hf_prefix_patch.backends.flex import FLEX
from hf_prefix_patch.backends.sdpa import SDPA
from hf_prefix_patch.backends.varlen import FLASH, TORCH_VARLEN
from hf_prefix_patch.features import flash_dtype, is_flash, sliding_window
from hf_prefix_patch.guards import not_packed

NAME = "prefix_sharing"
"""The name in transformers' attention registry."""

EMPTY_MASK = (1, 1, 0, 0)
"""Shape of the attention mask of a packed row. transformers hands a 4-D mask on as it is; shared
attention reads none, and any other attention fails on one of no size, where it would leak between
branches."""

BACKENDS = {backend.name: backend for backend in (FLASH, TORCH_VARLEN, SDPA, FLEX)}
"""All backends; `"auto"` takes the first that serves, and flex only by name."""

_UNSERVED = ("sinks", "position_bias", "indices", "block_indices")
_FEATURES = {"softcap": "softcap", "s_aux": "sinks", "sliding_window": "window"}


def prefix_sharing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function, with the signature that transformers' registry asks for.

    Args:
        module: the attention module; its config is the view that `enable_prefix_sharing` made.
        query: `[B, heads, N, head_dim]`; `key` and `value` may have fewer heads.
        attention_mask: used without descriptors only; the packed call carries a dummy.
        kwargs: `tree_backend` and the `tree_*` descriptors in the packed call.

    Raises:
        NotImplementedError: a packed call asks for what its backend does not serve.
    """
    backend: Backend | None = kwargs.get("tree_backend")
    if backend is None:
        return _original(module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = _as_flash_casts(module, query, key, value)
    seen = kwargs.get("tree_seen")
    if seen is not None and not torch.compiler.is_compiling():
        seen.note(value)
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"{type(module).__name__} attends with {query.shape[2]} of the {key.shape[2]} packed "
            "tokens, but shared attention needs all of them; leave out logits_to_keep"
        )
    if query.shape[0] != 1:
        raise not_packed(module, query.shape)
    _check_call(module, backend, attention_mask, dropout, kwargs)
    output = backend.attend(
        module,
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        s_aux=kwargs.get("s_aux"),
        **{name: x for name, x in kwargs.items() if name.startswith("tree_")},
    )
    return output, None


def _as_flash_casts(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the attention of a model loaded with flash attention computes in, whichever backend
    serves it: where queries arrive in fp32 (PEFT may keep norms in fp32), transformers casts to
    autocast's type, else to that of the quantised model, else to that of the weights."""
    if query.dtype != torch.float32:
        return query, key, value
    config: Any = module.config.prefix_sharing_original  # type: ignore[union-attr]
    if not is_flash(config._attn_implementation):
        return query, key, value
    dtype = autocast_dtype(query.device) or flash_dtype(config)
    if dtype is None:
        weights = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
        dtype = next((x.dtype for x in weights if x.is_floating_point()), query.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _check_call(
    module: nn.Module,
    backend: Backend,
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    """Refuse what a packed call cannot honour, whether or not the model was verified."""
    name = type(module).__name__
    for argument in _UNSERVED:
        if kwargs.get(argument) is not None:
            raise NotImplementedError(
                f"{name} passes {argument!r} to its attention function, which no prefix-sharing "
                "backend serves; leave this model unpatched"
            )
    asked = {feature for name, feature in _FEATURES.items() if kwargs.get(name) is not None}
    for feature in asked | ({"dropout"} if dropout else set()):
        if feature not in backend.features:
            raise NotImplementedError(
                f"{name} uses {feature} in its attention, which the backend {backend.name!r} does "
                f'not serve; pass backend="sdpa"'
            )
    if mask is not None and tuple(mask.shape) != EMPTY_MASK:
        raise NotImplementedError(
            f"{name} makes an attention mask of its own, of shape {list(mask.shape)}, which shared "
            "attention would not see; leave this model unpatched"
        )
    # The unpatched model may put a window into its mask alone.
    config: Any = module.config
    given = kwargs.get("sliding_window")
    wanted = sliding_window(config) if config.prefix_sharing_slides else None
    if config.prefix_sharing_slides is not None and given != wanted:
        raise NotImplementedError(
            f"{name} passes the sliding window {given} to its attention function, but the config "
            f"says {wanted}; set sliding_window there to what the layers were made with, None if "
            "no layer has one, or leave this model unpatched"
        )


class _AsUnpatched:
    """An attention module seen with the config it had before; transformers' flash wrapper reads
    the implementation's name from there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _original(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the module would call if it were not patched."""
    config: Any = module.config.prefix_sharing_original  # type: ignore[union-attr]
    name = config._attn_implementation
    if name != "eager":
        function = ALL_ATTENTION_FUNCTIONS[name]
        view = module if name == "sdpa" else _AsUnpatched(module, config)
        return lambda _, *args, **kwargs: function(view, *args, **kwargs)
    for cls in type(module).__mro__:
        eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager is not None:
            return cast(Callable[..., tuple[Tensor, Tensor | None]], eager)
    raise NotImplementedError(
        f"no eager_attention_forward beside {type(module).__name__}; load the model with "
        'attn_implementation="sdpa"'
    )


AttentionInterface.register(NAME, prefix_sharing_attention)
