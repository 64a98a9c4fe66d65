"""Plain causal attention on a CPU: kernel calls on those tiles of scores that are visible.

Outputs over several tiles are merged by their log-sum-exp (Milakov and Gimelshein,
arXiv 1805.02867); backward gives the kernel the merged output and log-sum-exp, with which the
gradients of a tile are those within the whole softmax (Dao et al., arXiv 2205.14135, section 3).
No key is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_prefix_patch.backends.base import HALF, as_blocks, rows_contiguous
from hf_prefix_patch.backends.tiles import Call, even_tiles, kernel_calls

# The kernel behind scaled_dot_product_attention on CPUs. Called by name because the public function
# keeps the log-sum-exp to itself.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@torch.library.custom_op("hf_prefix_patch::cpu_attention", mutates_args=())
def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of the packed row; `[1, heads, N, head_dim]` all, equal head sizes.

    Args:
        blocks: of `as_tensor(segment_blocks(tree))`.

    Returns:
        Output as `[1, N, heads, head_dim]` and log-sum-exp `[1, N, heads]`.
    """
    query, key, value = rows_contiguous(query, key, value)
    exact = torch.promote_types(query.dtype, torch.float32)
    _, heads, tokens, size = query.shape
    output = query.new_empty((1, tokens, heads, size), dtype=exact)
    lse = query.new_empty((1, tokens, heads), dtype=exact)
    whole = output.transpose(1, 2), lse.transpose(1, 2)[..., None]
    for call in kernel_calls(as_blocks(blocks), query.dtype):
        inputs, seen = _inputs(call, query, key, value)
        # No name holds a part, here and in backward: the next one takes its memory, in the cache.
        _merge(call, whole, *_forward(*inputs, **seen, scale=scaling))
    return output.to(query.dtype), lse


@torch.library.custom_op("hf_prefix_patch::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    blocks: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, lse = query.dtype, lse.transpose(1, 2)[..., None]
    rows = rows_contiguous(grad.transpose(1, 2), query, key, value, output.transpose(1, 2))
    grad, query, key, value, output = (x.to(lse.dtype) for x in rows)
    # Laid out by tokens, as the kernel lays out its parts.
    dq, dk, dv = _by_tokens(query), _by_tokens(key).zero_(), _by_tokens(value).zero_()
    pieces = even_tiles(key.shape[1], torch.get_num_threads())
    for call in kernel_calls(as_blocks(blocks), query.dtype, pieces):
        inputs, seen = _inputs(call, query, key, value)
        direction, merged, merged_lse = (call.queries.of(x) for x in (grad, output, lse))
        given = (direction, *inputs, merged, merged_lse[..., 0])
        _add(call, (dq, dk, dv), _backward(*given, dropout_p=0.0, **seen, scale=scaling))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def served_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these, on a CPU, and the user has not switched it off
    (`torch.nn.attention.sdpa_kernel`)."""
    if query.device.type != "cpu" or query.dtype not in (*HALF, torch.float32, torch.float64):
        return False
    if any(x.dtype != query.dtype or x.shape[-1] != query.shape[-1] for x in (key, value)):
        return False
    if torch.compiler.is_compiling():  # which cannot look
        return True
    enabled: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    return enabled


def _by_tokens(x: Tensor) -> Tensor:
    """`[1, heads, N, D]` like `x`, laid out as `[1, N, heads, D]`."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _inputs(
    call: Call, query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """What the kernel takes of them, and its options for what queries see."""
    inputs = call.queries.of(query), call.keys.of(key), call.keys.of(value)
    return inputs, {"is_causal": call.causal and call.mask is None, "attn_mask": call.mask}


def _merge(call: Call, whole: tuple[Tensor, Tensor], part: Tensor, part_lse: Tensor) -> None:
    """Take a part into the output and the log-sum-exp of the packed row."""
    merged, merged_lse = (call.queries.of(x) for x in whole)
    part_lse = part_lse[..., None]
    if call.causal:  # those come first, and cover every token once
        merged.copy_(part)
        merged_lse.copy_(part_lse)
        return
    # The part's share of the softmax: exp(part_lse) / (exp(part_lse) + exp(merged_lse)).
    merged.lerp_(part.to(merged.dtype), torch.sigmoid(part_lse - merged_lse))
    torch.logaddexp(merged_lse, part_lse, out=merged_lse)


def _add(call: Call, totals: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    """Add the gradients of a part's queries, keys and values to those of the packed row."""
    places = call.queries, call.keys, call.keys
    new = call.causal, False, False  # causal calls come first, and cover every token once
    for place, total, part, first in zip(places, totals, parts, new, strict=True):
        tiles = place.of(total)
        if first:
            tiles.copy_(part)
        elif place.period:
            tiles.add_(part)
        else:
            for tile, piece in zip(tiles, part, strict=True):  # the same tokens each time
                tile.add_(piece)


@cpu_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    _, heads, tokens, size = query.shape
    total = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty((1, tokens, heads), dtype=total)
    return query.new_empty((1, tokens, heads, size)), lse


@cpu_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_by_tokens(x) for x in (query, key, value))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, blocks, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, *output, blocks)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:  # what comes after differentiates nothing, a fused loss of its reference
        return (None,) * 5
    query, key, value, output, lse, blocks = ctx.saved_tensors
    grads = cpu_attention_backward(grad, query, key, value, output, lse, blocks, ctx.scaling)
    return (*grads, None, None)


cpu_attention.register_autograd(_differentiate, setup_context=_keep)
