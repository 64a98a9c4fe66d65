"""The `torch_varlen` and `flash` backends: one variable-length call for the whole packed row.

Every chain is one sequence: its queries stand in the packed row, its keys and values are gathered
from the stretches of its path, of which layers with a sliding window need the end alone. The call
is causal and aligned bottom-right, so that the last query of a chain sees its whole path, or all of
its window: inside a path, index equals position.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import modeling_flash_attention_utils as hf_flash

from hf_prefix_patch import versions
from hf_prefix_patch.backends.base import (
    HALF,
    Backend,
    Needs,
    chain_blocks,
    of_window,
    rows_contiguous,
    to_autocast_dtype,
    varying,
)
from hf_prefix_patch.features import is_flash
from hf_prefix_patch.tree import PrefixTree, to_device

# Where the functions of a flash implementation come from, if transformers does not tell.
_FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}

# What the variable-length functions call the features of `Needs`.
_ARGUMENTS = {
    "window": {"window_size"},
    "softcap": {"softcap"},
    "dropout": {"dropout_p"},
    "sinks": {"s_aux", "learnable_sink"},
}


def torch_varlen_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    tree_chains: dict[int | None, dict[str, Any]],
    **unused: Any,
) -> Tensor:
    """Shared attention by `torch.nn.attention.varlen.varlen_attn`, PyTorch's own FlashAttention.

    Args:
        query: `[1, heads, N, head_dim]`, fp16 or bf16 (fp32 under autocast).
        sliding_window: number of keys seen, the query's own included.
        tree_chains: one plan for each window of the model's layers, as `_chains` makes it.

    Returns:
        `[1, N, heads, head_dim]`.

    Raises:
        NotImplementedError: fp32 queries outside autocast.
    """
    query, key, value = to_autocast_dtype(query, key, value)
    if query.dtype == torch.float32:
        raise NotImplementedError(
            f"{type(module).__name__} computes attention in float32 outside autocast, which the "
            'backend "torch_varlen" does not; pass backend="sdpa", or train under autocast'
        )
    chains = of_window(tree_chains, sliding_window, module)
    q, k, v, size = _sequences(query, key, value, chains)
    grouped: dict[str, Any] = {}
    if versions.VARLEN_IS_TOLD_OF_GROUPS:
        grouped["enable_gqa"] = q.shape[1] != k.shape[1]
    output = varlen.varlen_attn(
        q,
        k,
        v,
        chains["cu_seqlens_q"],
        chains["cu_seqlens_k"],
        chains["max_seqlen_q"],
        chains["max_seqlen_k"],
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **grouped,
    )
    assert isinstance(output, Tensor)
    return output[..., :size].unsqueeze(0)


def flash_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree_chains: dict[int | None, dict[str, Any]],
    **unused: Any,
) -> Tensor:
    """Shared attention by the variable-length function that transformers resolves for the model's
    own implementation, called through transformers so that options are treated alike.

    Arguments and result are those of `torch_varlen_attend`; softcap, dropout and sinks (`s_aux`,
    `[heads]`) as far as that function has them.
    """
    config: Any = module.config.prefix_sharing_original  # type: ignore[union-attr]
    chains = of_window(tree_chains, sliding_window, module)
    q, k, v, size = _sequences(query, key, value, chains)
    output: Tensor = hf_flash._flash_attention_forward(
        q[None],
        k[None],
        v[None],
        attention_mask=None,
        query_length=q.shape[0],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        deterministic=torch.are_deterministic_algorithms_enabled() or None,
        cu_seq_lens_q=chains["cu_seqlens_q"],
        cu_seq_lens_k=chains["cu_seqlens_k"],
        max_length_q=chains["max_seqlen_q"],
        max_length_k=chains["max_seqlen_k"],
        attn_implementation=config._attn_implementation,
        s_aux=None if s_aux is None else s_aux.to(query.dtype),
    )
    return output[..., :size]


def _sequences(
    query: Tensor, key: Tensor, value: Tensor, chains: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Queries `[N, heads, D]`, keys and values `[K, heads, D]`, and the size of a value head."""
    size = value.shape[-1]
    if size < query.shape[-1]:  # the kernels take one head size; zeros add nothing
        value = F.pad(value, (0, query.shape[-1] - size))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if chains["num_keys"] != k.shape[0]:
        k, v = gather_paths(k, v, chains["keys"], chains["places"], chains["starts"])
    q, k, v = rows_contiguous(q, k, v)
    return q, k, v, size


def gather_paths(
    key: Tensor, value: Tensor, keys: Tensor, places: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """`[N, heads, D]` packed keys and values to `[K, heads, D]`, the paths of chains end to end.

    Args:
        keys: `[K]` int32, the packed token that each gathered key is of.
        places: `[K]` int32, where the keys of the packed tokens went, token by token.
        starts: `[N]` int32, where those of each token start in `places`.
    """
    gathered: tuple[Tensor, Tensor] = _GatherPaths.apply(  # type: ignore[no-untyped-call]
        key, value, keys, places, starts
    )
    return gathered


class _GatherPaths(torch.autograd.Function):
    """Has a backward of its own: that of `index_select` adds by atomics on CUDA, in the type of the
    gradient. This one adds the gradients of a token in one order, in fp32, on any device, and a
    batch of many rows takes as many kernels as one pair."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, keys: Tensor, places: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(places, starts)
        return key.index_select(0, keys), value.index_select(0, keys)

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        path = ctx.saved_tensors
        sums = (
            _sums(grad, *path) if needed else None
            for grad, needed in zip((grad_key, grad_value), ctx.needs_input_grad, strict=False)
        )
        return *sums, None, None, None


def _sums(grad: Tensor, places: Tensor, starts: Tensor) -> Tensor:
    """`[K, heads, D]` to `[N, heads, D]`: a bag of embeddings is summed in fp32 or better."""
    sums: Tensor = torch.embedding_bag(grad.flatten(1), places, starts)[0]
    return sums.view(-1, *grad.shape[1:])


def _plan(tree: PrefixTree, needs: Needs) -> dict[str, Any]:
    blocks = np.array(chain_blocks(tree))
    windows = needs.windows
    return {"tree_chains": {window: _chains(blocks, window, needs.device) for window in windows}}


def _chains(blocks: np.ndarray, window: int | None, device: torch.device) -> dict[str, Any]:
    """Boundaries of chains and of their keys for the kernel, `[C+1]` int32, and what `gather_paths`
    takes where there are more keys than tokens.

    Args:
        blocks: `[B, 4]`, of `chain_blocks`.
        window: of the layers; None for the whole path.
    """
    _, stops, starts, ends = blocks.T
    stops, first, chain = np.unique(stops, return_index=True, return_inverse=True)
    lengths = np.diff(stops, prepend=0)
    keys = np.add.reduceat(ends - starts, first)
    if window is not None:
        behind = keys.cumsum()[chain] - (ends - starts).cumsum()  # of its path, each stretch
        # One key more than a window has: transformers before 4.56 lets flash attention see that.
        keys = np.minimum(keys, lengths + window)
        starts = np.clip(ends - (keys[chain] - behind), starts, ends)
    num_keys = int(keys.sum())
    arrays = {
        "cu_seqlens_q": np.append(0, stops),
        "cu_seqlens_k": np.append(0, keys.cumsum()),
    }
    if num_keys != stops[-1]:
        arrays |= _paths(starts, ends)
    tensors = {name: torch.from_numpy(x.astype(np.int32)) for name, x in arrays.items()}
    return {
        **{name: varying(to_device(x, device)) for name, x in tensors.items()},
        "max_seqlen_q": int(lengths.max()),
        "max_seqlen_k": int(keys.max()),
        "num_keys": num_keys,
    }


def _paths(starts: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
    """`keys`, `places` and `starts` of `gather_paths`, from the stretches of all paths."""
    stretches = zip(starts, ends, strict=True)
    keys = np.concatenate([np.arange(*stretch, dtype=np.int32) for stretch in stretches])
    copies = np.bincount(keys)
    places = keys.argsort(kind="stable")
    return {"keys": keys, "places": places, "starts": copies.cumsum() - copies}


def _torch_varlen_unserved(needs: Needs) -> str | None:
    if needs.device.type != "cuda" or torch.version.hip is not None:
        return f"it needs a CUDA device, and the model is on {needs.device.type}"
    if torch.cuda.get_device_capability(needs.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or later"
    if any(size % 8 or size > 256 for size in needs.head_dims):
        return f"it takes head sizes up to 256, multiples of 8, not {sorted(needs.head_dims)}"
    if versions.VARLEN_IS_SWITCHED_WITH_SDPA and "flash" not in needs.kernels:
        return "FlashAttention is switched off (torch.nn.attention.sdpa_kernel, enable_flash_sdp)"
    return _half_precision_unserved(needs)


def _flash_unserved(needs: Needs) -> str | None:
    name = needs.implementation
    if not is_flash(name):
        return f'it needs a model loaded with flash attention, and this one has "{name}"'
    if needs.device.type == "cpu":
        return "it needs a GPU, and the model is on cpu"
    try:
        names = set(inspect.signature(_flash_varlen_function(name)).parameters)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        return f'transformers finds no variable-length function for "{name}" ({error})'
    missing = sorted(x for x in needs.features if not names & _ARGUMENTS[x])
    if missing:
        return f'the function of "{name}" has no {" or ".join(missing)}'
    return _half_precision_unserved(needs)


def _flash_varlen_function(implementation: str) -> Callable[..., Any]:
    if not versions.FLASH_IS_RESOLVED:
        package = _FLASH_PACKAGES.get(implementation)
        if package is None:
            raise ValueError(f"it knows {sorted(_FLASH_PACKAGES)} only")
        function: Callable[..., Any] = importlib.import_module(package).flash_attn_varlen_func
        return function
    functions, _ = hf_flash.lazy_import_flash_attention(implementation)
    if functions[1] is None:
        raise ValueError("the kernel has none")
    return functions[1]


def _half_precision_unserved(needs: Needs) -> str | None:
    if needs.dtype in HALF:
        return None
    return (
        f"it computes in fp16 or bf16, and the model in {str(needs.dtype).removeprefix('torch.')} "
        "(load it in half precision or call it under autocast)"
    )


TORCH_VARLEN = Backend(
    name="torch_varlen",
    attend=torch_varlen_attend,
    plan=_plan,
    unserved=_torch_varlen_unserved,
    features=frozenset({"window"}),
)
FLASH = Backend(
    name="flash",
    attend=flash_attend,
    plan=_plan,
    unserved=_flash_unserved,
    features=frozenset({"window", "softcap", "sinks", "dropout"}),
)
