"""The `flex` backend: FlexAttention with a block-sparse mask, as in the paper (arXiv 2410.20305).

The mask is made once per batch from the same tree as the other backends' descriptors. It needs the
packed row to be depth-first: a token sees those before it whose subtree it stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hf_prefix_patch.backends.base import (
    HALF,
    Backend,
    Needs,
    of_window,
    subtree_ends,
    to_autocast_dtype,
)
from hf_prefix_patch.tree import PrefixTree, to_device

_BLOCK = 128
_KINDS = 64  # of calls that a process compiles: heads and their sizes, windows, types, gradients
_NARROWEST = 16  # head size that FlexAttention's kernel takes

# The kernels hold tiles of queries, keys and values in the shared memory that a block of a GPU has:
# 99 KiB on consumer cards, 163 on an A100, 227 on an H100. Where a token of a head has 512 bytes or
# more, PyTorch's own tiles take up to 226 KiB, and 257 with heads of more than 256 (torch 2.11,
# compiled for those cards).
_WIDE = 512
_AMPLE = 226 * 1024
_SMALL_TILES = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}
# In backward those of fp32 and of heads of more than 256 are small already.
_SMALL_TILES_OF_HALF = _SMALL_TILES | {
    **dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32),
    "bwd_num_stages": 1,
}


def flex_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree_block_masks: dict[int | None, BlockMask],
    tree_tiles: dict[str, int] | None = None,
    **unused: Any,
) -> Tensor:
    """Shared attention by `flex_attention`.

    Args:
        query: `[1, heads, N, head_dim]`; key and value may have fewer heads.
        sliding_window: number of keys seen, the query's own included.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: `[heads]` attention sinks.
        tree_block_masks: one for each window of the model's layers.
        tree_tiles: `kernel_options` of `flex_attention`; None for PyTorch's own.

    Returns:
        `[1, N, heads, head_dim]`.
    """
    query, key, value = to_autocast_dtype(query, key, value)
    block_mask = of_window(tree_block_masks, sliding_window, module)
    output = _flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _soft_capped(softcap, query.device),
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=tree_tiles,
        return_aux=None if s_aux is None else AuxRequest(lse=True),
    )
    if s_aux is not None:
        # One more score in the softmax whose weight goes nowhere.
        output, aux = output
        kept = torch.sigmoid(aux.lse - s_aux.to(aux.lse.dtype).view(1, -1, 1))
        output = (output * kept[..., None]).to(query.dtype)
    return output.transpose(1, 2)  # type: ignore[no-any-return]


def _flex() -> Callable[..., Any]:
    if torch.compiler.is_compiling():
        return cast(Callable[..., Any], flex_attention)
    return _compiled_flex()


@cache
def _compiled_flex() -> Callable[..., Any]:
    compiled = torch.compile(flex_attention)

    def run(*args: Any, **kwargs: Any) -> Any:
        # Beyond the compiler's own limit of 8 it would run unfused, on scores of the whole row.
        limits = {"recompile_limit": _KINDS, "fail_on_recompile_limit_hit": True}
        with torch._dynamo.config.patch(limits):  # its own in each call, as threads may overlap
            return compiled(*args, **kwargs)

    return run


def _soft_capped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    # A tensor, as for windows, where all models share what is compiled; a compiled layer has one
    # number, which is a constant.
    compiling = torch.compiler.is_compiling()
    cap = softcap if compiling else torch.full((), softcap, device=device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return score_mod


def tree_block_mask(tree: PrefixTree, window: int | None, device: torch.device) -> BlockMask:
    """The mask of the packed row, `[N, N]` in blocks of 128, without ever building it whole.

    Blocks of which some or all entries are visible follow from the least and greatest subtree end
    and depth of their tokens.
    """
    host = (torch.tensor(x, device="cpu") for x in _ends_and_depths(tree))
    end, depth = (to_device(x, device) for x in host)
    # A number in the closure is a constant of what is compiled; a second one would become a symbol.
    reach = None if window is None else torch.full((), window, device=device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = (kv <= q) & (q < end[kv])
        return seen if reach is None else seen & (depth[q] - depth[kv] < reach)

    tokens = tree.packed_tokens
    first = torch.arange(0, tokens, _BLOCK, device=device)
    last = (first + _BLOCK - 1).clamp(max=tokens - 1)
    least_end, most_end = _extremes(end, first)
    least_depth, most_depth = _extremes(depth, first)
    below = first[:, None] > last  # every query of the block stands after every key
    some = (below & (first[:, None] < most_end)) | (first[:, None] == first)
    every = below & (last[:, None] < least_end)
    if window is not None:
        some &= least_depth[:, None] - most_depth < window
        every &= most_depth[:, None] - least_depth < window
    return BlockMask.from_kv_blocks(
        *_block_lists(some & ~every),
        *_block_lists(every),
        BLOCK_SIZE=_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(tokens, tokens),
    )


def _ends_and_depths(tree: PrefixTree) -> tuple[list[int], list[int]]:
    """Of each packed token: where its subtree ends, and how many tokens stand before it."""
    segments = zip(tree.segment_lengths, tree.path_lengths, subtree_ends(tree), strict=True)
    ends: list[int] = []
    depths: list[int] = []
    for length, path, end in segments:
        ends += [end] * length
        depths += range(path - length, path)
    return ends, depths


def _extremes(x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value in each block; the last token fills up the last block."""
    filled = torch.cat([x, x[-1:].expand(len(first) * _BLOCK - len(x))]).view(-1, _BLOCK)
    return filled.amin(1), filled.amax(1)


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of `[Q, KV]` bool blocks marks, and which, marked ones first."""
    order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
    return blocks.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def _plan(tree: PrefixTree, needs: Needs) -> dict[str, Any]:
    masks = {window: tree_block_mask(tree, window, needs.device) for window in needs.windows}
    return {"tree_block_masks": masks, "tree_tiles": _tiles(needs)}


def _tiles(needs: Needs) -> dict[str, int] | None:
    """Smaller tiles than PyTorch's, where those do not fit on the device; else None."""
    if needs.device.type != "cuda" or torch.version.hip is not None:
        return None
    size = max(needs.head_dims, default=1)
    token = needs.dtype.itemsize * 2 ** (size - 1).bit_length()
    card: Any = torch.cuda.get_device_properties(needs.device)
    if size <= 256 and (token < _WIDE or card.shared_memory_per_block_optin >= _AMPLE):
        return None
    return _SMALL_TILES_OF_HALF if needs.dtype in HALF and size <= 256 else _SMALL_TILES


def _unserved(needs: Needs) -> str | None:
    if needs.device.type != "cuda":
        return f"it has no backward on {needs.device.type}, only on a CUDA device"
    if needs.dtype not in (*HALF, torch.float32):
        return f"it does not compute in {str(needs.dtype).removeprefix('torch.')}"
    narrow = [size for size in sorted(needs.head_dims) if size < _NARROWEST]
    if narrow:
        return f"it takes heads of at least {_NARROWEST}, and this model has some of {narrow}"
    return None


FLEX = Backend(
    name="flex",
    attend=flex_attend,
    plan=_plan,
    unserved=_unserved,
    features=frozenset({"window", "softcap", "sinks"}),
)
