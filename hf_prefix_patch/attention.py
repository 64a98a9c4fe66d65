"""The attention function that transformers calls, and the backends behind it.

A call that carries the descriptors of a `PrefixTree` runs shared attention on the packed row; any
other call runs the implementation that the model's own config names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_prefix_patch.support import layer_window
from hf_prefix_patch.tree import PrefixTree

NAME = "prefix_sharing"
"""The name in transformers' attention registry."""

EMPTY_MASK = (1, 1, 0, 0)
"""Shape of the mask in the packed call."""

_UNSERVED = ("s_aux", "sinks", "position_bias", "indices", "block_indices")


@dataclass(frozen=True)
class Backend:
    """One way to run shared attention.

    Attributes:
        name: what `enable_prefix_sharing(backend=...)` takes.
        attend: `(query, key, value, *, scaling, dropout, sliding_window, softcap, **descriptors)`
            to `[1, N, heads, head_dim]`; query, key and value are `[1, heads, N, head_dim]`.
        plan: from the tree, what `attend` needs beside the five public descriptors; once a call.
    """

    name: str
    attend: Callable[..., Tensor]
    plan: Callable[[PrefixTree], dict[str, Any]]


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
        kwargs: `tree_attend` and the `tree_*` descriptors in the packed call.

    Raises:
        NotImplementedError: a packed call asks for what no backend serves.
    """
    attend = kwargs.get("tree_attend")
    if attend is None:
        run = _original(module)
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return run(module, query, key, value, attention_mask, **kwargs)
    _check_call(module, attention_mask, kwargs)
    output = attend(
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        **{name: x for name, x in kwargs.items() if name.startswith("tree_")},
    )
    return output, None


def _check_call(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse what a packed call cannot honour, whether or not the model was verified."""
    name = type(module).__name__
    for feature in _UNSERVED:
        if kwargs.get(feature) is not None:
            raise NotImplementedError(
                f"{name} passes {feature!r} to its attention function, which no prefix-sharing "
                "backend serves; leave this model unpatched"
            )
    if mask is not None and tuple(mask.shape) != EMPTY_MASK:
        raise NotImplementedError(
            f"{name} makes an attention mask of its own, of shape {list(mask.shape)}, which shared "
            "attention would not see; leave this model unpatched"
        )
    # The unpatched model may put a window into its mask alone.
    window, layer = kwargs.get("sliding_window"), getattr(module, "layer_idx", None)
    if layer is not None and window != layer_window(module.config, layer):
        raise NotImplementedError(
            f"{name} of layer {layer} passes the sliding window {window} to its attention "
            f"function, but the config says {layer_window(module.config, layer)}; leave this model "
            "unpatched"
        )


def sdpa_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    tree_segments: Sequence[tuple[int, tuple[int, ...]]],
    **unused: Any,
) -> Tensor:
    """Shared attention with one `scaled_dot_product_attention` call per segment.

    Args:
        tree_segments: for each segment its length and the segments on its path, itself last.

    Returns:
        `[1, N, heads, head_dim]`.
    """
    lengths = [length for length, _ in tree_segments]
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    outputs = []
    for q, (_, path) in zip(queries, tree_segments, strict=True):
        k, v = _join(keys, path), _join(values, path)
        if sliding_window is not None and k.shape[2] > q.shape[2] + sliding_window - 1:
            seen = q.shape[2] + sliding_window - 1
            k, v = k[:, :, -seen:], v[:, :, -seen:]
        window = sliding_window if sliding_window and sliding_window < k.shape[2] else None
        if softcap is None:
            output = _sdpa(q, k, v, scaling, dropout, window)
        else:
            output = _softcapped(q, k, v, scaling, dropout, window, softcap)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def sdpa_plan(tree: PrefixTree) -> dict[str, Any]:
    paths: list[tuple[int, ...]] = []
    for segment, parent in enumerate(tree.parents):
        paths.append((*(paths[parent] if parent >= 0 else ()), segment))
    return {"tree_segments": tuple(zip(tree.segment_lengths, paths, strict=True))}


BACKENDS = {"sdpa": Backend("sdpa", sdpa_attend, sdpa_plan)}


def _join(pieces: Sequence[Tensor], path: tuple[int, ...]) -> Tensor:
    return pieces[path[0]] if len(path) == 1 else torch.cat([pieces[i] for i in path], dim=2)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None
) -> Tensor:
    """Causal attention of `n` queries to `m >= n` keys, aligned bottom-right."""
    n, m = q.shape[2], k.shape[2]
    # The causal kernel skips half of the scores but aligns top-left: up to as many keys ahead of
    # the segment as it has queries, dummy queries before it cost less than a mask does.
    align = m - n if window is None and 1 < n < m <= 2 * n else 0
    causal = window is None and (n == m or align > 0)
    mask = None if causal or (n == 1 and window is None) else _visible(n, m, window, q.device)
    # Off the CPU, a mask or fp32 together with grouped queries leaves only the math kernel.
    grouped = q.device.type == "cpu" or (mask is None and q.dtype != torch.float32)
    if not grouped:
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    output = F.scaled_dot_product_attention(
        F.pad(q, (0, 0, align, 0)) if align else q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[:, :, align:]


def _softcapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float,
) -> Tensor:
    """`softmax(softcap * tanh(scores / softcap))` with explicit scores (Gemma 2, section 2)."""
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    scores = torch.tanh(q @ k.transpose(2, 3) * scaling / softcap) * softcap
    hidden = ~_visible(q.shape[2], k.shape[2], window, q.device)
    at_least_fp32 = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=at_least_fp32)
    return F.dropout(weights.to(q.dtype), dropout) @ v


def _visible(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """`[n, m]` bool: the keys that each query sees; a window counts the query's own key."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return mask if window is None else mask.triu(m - n - window + 1)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


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
