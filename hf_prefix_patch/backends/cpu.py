"""Plain causal attention on a CPU: kernel calls on those tiles of scores that are visible.

A segment attends to itself, causal, and all of its descendants together to the whole of it. Long
segments are halved again and again: two causal halves, and a whole tile of the later queries on the
earlier keys. Of what is left the kernel would compute all scores, as its causal mode skips whole
blocks of 512 keys only: it is cut into strips of queries, each on the keys up to its end.
Outputs over several tiles are merged by their log-sum-exp (Milakov and Gimelshein,
arXiv 1805.02867); backward gives the kernel the merged output and log-sum-exp, with which the
gradients of a tile are those within the whole softmax (Dao et al., arXiv 2205.14135, section 3).
No key is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_prefix_patch.backends.base import HALF, as_blocks, rows_contiguous

# The kernel behind scaled_dot_product_attention on CPUs. Called by name because the public function
# keeps the log-sum-exp to itself.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Sizes(NamedTuple):
    """Queries of a call, at least: of a causal tile, and of a strip that a tile is cut into."""

    tile: int
    strip: int


_SIZES = Sizes(tile=256, strip=64)
# In half precision the kernel is slow at few queries, most of all in backward: no strips there.
_HALF_SIZES = Sizes(tile=1024, strip=2048)
_SHORTEST = 32  # queries of a tile that is split off for a thread: the kernel's own least


class Tiles(NamedTuple):
    """Equal stretches of the packed row: `number` times `length` tokens, `period` apart."""

    start: int
    length: int
    number: int = 1
    period: int = 0

    def of(self, x: Tensor) -> Tensor:
        """`[1, heads, N, D]` to a view `[number, heads, length, D]`."""
        _, heads, _, size = x.shape
        _, head, token, element = x.stride()
        return x.as_strided(
            (self.number, heads, self.length, size),
            (self.period * token, head, token, element),
            x.storage_offset() + self.start * token,
        )


class Call(NamedTuple):
    """Scores that one kernel call computes; whole tiles of keys, or up to the query's own."""

    queries: Tiles
    keys: Tiles
    causal: bool = False  # aligned bottom-right


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
    for call in _calls(blocks, key.shape[1], key.dtype):
        inputs, seen = _inputs(call, query, key, value)
        part, part_lse = _forward(*inputs, **seen, scale=scaling)
        merged, merged_lse = (call.queries.of(x) for x in whole)
        part_lse = part_lse[..., None]
        if call.causal:  # those come first, and cover every token once
            merged.copy_(part)
            merged_lse.copy_(part_lse)
            continue
        # The part's share of the softmax: exp(part_lse) / (exp(part_lse) + exp(merged_lse)).
        merged.lerp_(part.to(exact), torch.sigmoid(part_lse - merged_lse))
        torch.logaddexp(merged_lse, part_lse, out=merged_lse)
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
    grad, query, key, value = rows_contiguous(grad, query, key, value)
    exact = torch.promote_types(query.dtype, torch.float32)
    # Laid out by tokens, as the kernel lays out its parts.
    grads = [_by_tokens(x, exact).zero_() for x in (query, key, value)]
    grad, output, lse = (x.transpose(1, 2) for x in (grad, output, lse))
    lse = lse[..., None]
    for call in _calls(blocks, key.shape[1], key.dtype):
        inputs, seen = _inputs(call, query, key, value)
        parts = _backward(
            call.queries.of(grad),
            *inputs,
            call.queries.of(output),
            call.queries.of(lse)[..., 0],
            dropout_p=0.0,
            **seen,
            scale=scaling,
        )
        places = (call.queries, call.keys, call.keys)
        for total, part, place in zip(grads, parts, places, strict=True):
            tiles = place.of(total)
            # Keys that several tiles of queries see have a gradient of each.
            for piece in [part] if part.shape == tiles.shape else part:
                tiles.add_(piece)
    dtypes = (query.dtype, key.dtype, value.dtype)
    dq, dk, dv = (x.to(dtype) for x, dtype in zip(grads, dtypes, strict=True))
    return dq, dk, dv


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


def _by_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[1, heads, N, D]` like `x`, laid out as `[1, N, heads, D]`."""
    return x.new_empty(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def _inputs(
    call: Call, query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """What the kernel takes of them, and its options for what queries see."""
    queries, keys, values = call.queries.of(query), call.keys.of(key), call.keys.of(value)
    count, length, seen = queries.shape[0], queries.shape[2], keys.shape[2]
    if keys.shape[0] < count:
        keys, values = (x.expand(count, -1, -1, -1) for x in (keys, values))
    mask = None
    if call.causal and seen > length:  # where the kernel's own mask is aligned top-left
        mask = query.new_full((length, seen), float("-inf")).triu_(seen - length + 1)
    options = {"is_causal": call.causal and mask is None, "attn_mask": mask}
    return (queries, keys, values), options


def _calls(blocks: Tensor, key_heads: int, dtype: torch.dtype) -> list[Call]:
    """The causal calls of all segments, which cover every query once, then what is seen whole."""
    sizes = _HALF_SIZES if dtype in HALF else _SIZES
    even = _even_tiles(key_heads, torch.get_num_threads())
    causal: list[Tiles] = []
    whole: list[Call] = []
    for q0, q1, k0, k1 in as_blocks(blocks):
        if (q0, q1) != (k0, k1):
            whole.append(Call(Tiles(q0, q1 - q0), Tiles(k0, k1 - k0)))
            continue
        for call in _halves(q0, q1, sizes.tile):
            if not call.causal:
                whole.append(call)
            elif causal and causal[-1].length == call.queries.length:
                # Right after it, as segments are in order and cover the packed row.
                start, length, number, _ = causal[-1]
                causal[-1] = Tiles(start, length, number + call.queries.number, length)
            else:
                causal.append(call.queries)
    strips = [strip for tiles in causal for strip in _strips(tiles, sizes.strip)]
    return strips + [piece for call in whole for piece in _pieces(call, even)]


def _strips(tiles: Tiles, size: int) -> Iterator[Call]:
    """Causal attention of tiles, the strips of all of them that lie alike in one call; the last
    takes what is left over."""
    start, length, number, period = tiles
    starts = range(0, max(1, length - size + 1), size)
    for first, stop in zip(starts, [*starts[1:], length], strict=True):
        queries = Tiles(start + first, stop - first, number, period)
        yield Call(queries, Tiles(start, stop, number, period), causal=True)


def _even_tiles(key_heads: int, threads: int) -> int:
    """Tiles of a call that keep the threads busy for four fifths of its time: in backward a thread
    takes all of a key head in a tile."""
    for number in count(1):
        tasks = number * key_heads
        if 5 * tasks >= 4 * threads * ceil(tasks / threads):
            break
    return number


def _halves(start: int, stop: int, tile: int) -> Iterator[Call]:
    """Causal attention of a segment: each of its tiles on itself, and later halves on earlier ones,
    all of a size in one call; what is more than a power of two of tiles comes after."""
    tiles = (stop - start) // tile
    if tiles < 2:
        segment = Tiles(start, stop - start)
        yield Call(segment, segment, causal=True)
        return
    size = tile << (tiles.bit_length() - 1)
    squares = Tiles(start, tile, size // tile, tile)
    yield Call(squares, squares, causal=True)
    half = tile
    while half < size:
        number, period = size // (2 * half), 2 * half
        later, earlier = (Tiles(s, half, number, period) for s in (start + half, start))
        yield Call(later, earlier)
        half *= 2
    if start + size < stop:
        yield Call(Tiles(start + size, stop - start - size), Tiles(start, size))
        yield from _halves(start + size, stop, tile)


def _pieces(call: Call, number: int) -> Iterator[Call]:
    """The same scores, queries in `number` tiles and those left over in a call of their own."""
    (start, length, tiles, period), keys = call.queries, call.keys
    pieces = min(number, length // _SHORTEST)
    if tiles >= number or pieces < 2:
        yield call
        return
    for tile in range(tiles):
        first = start + tile * period
        seen = Tiles(keys.start + tile * keys.period, keys.length)
        each, left = divmod(length, pieces)
        yield Call(Tiles(first, each, pieces, each), seen)
        if left:
            yield Call(Tiles(first + length - left, left), seen)


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
    dq, dk, dv = (_by_tokens(x, x.dtype) for x in (query, key, value))
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
