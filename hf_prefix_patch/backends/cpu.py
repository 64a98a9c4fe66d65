"""Plain causal attention on a CPU: kernel calls on those tiles of scores that are visible.

A segment attends to itself, causal, and all of its descendants together to the whole of it. Long
segments are halved again and again: two causal halves, and a whole tile of the later queries on the
earlier keys. Of what is left the kernel would compute all scores, as its causal mode skips whole
blocks of 512 keys only: it is cut into strips of queries, each on the keys up to its end.
Outputs over several tiles are merged by their log-sum-exp (Milakov and Gimelshein,
arXiv 1805.02867); backward gives the kernel the merged output and log-sum-exp, with which the
gradients of a tile are those within the whole softmax (Dao et al., arXiv 2205.14135, section 3);
there a thread takes all of a key head in a tile, and calls are cut until all threads are busy. No
key is copied.
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
# In half precision the kernel is slow at few queries: no strips, and backward computes in fp32.
_HALF_SIZES = Sizes(tile=1024, strip=2048)
# Least queries or keys of a tile that is split off for a thread: the kernel's own blocks.
_SHORTEST, _KEYS = 32, 512


class Tiles(NamedTuple):
    """Equal stretches of the packed row: `number` times `length` tokens, `period` apart; with a
    period of zero the same tokens each time."""

    start: int
    length: int
    number: int = 1
    period: int = 0

    @property
    def stop(self) -> int:
        return self.start + (self.number - 1) * self.period + self.length

    def at(self, index: int) -> Tiles:
        return Tiles(self.start + index * self.period, self.length)

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
    """Scores that one kernel call computes: of as many tiles of queries as of keys, each on all of
    its keys, or causal."""

    queries: Tiles
    keys: Tiles
    causal: bool = False  # the last query sees all keys; tiles on the same keys follow each other


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
    for call in _calls(blocks, key.dtype):
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
    dtype, lse = query.dtype, lse.transpose(1, 2)[..., None]
    given = rows_contiguous(grad.transpose(1, 2), query, key, value, output.transpose(1, 2))
    grad, query, key, value, output = (x.to(lse.dtype) for x in given)
    # Laid out by tokens, as the kernel lays out its parts.
    dq, dk, dv = _by_tokens(query), _by_tokens(key).zero_(), _by_tokens(value).zero_()
    number = _even_tiles(key.shape[1], torch.get_num_threads())
    calls = _calls(blocks, query.dtype)
    for call in (piece for whole in calls for piece in _pieces(whole, number)):
        inputs, seen = _inputs(call, query, key, value)
        part, *of_keys = _backward(
            call.queries.of(grad),
            *inputs,
            call.queries.of(output),
            call.queries.of(lse)[..., 0],
            dropout_p=0.0,
            **seen,
            scale=scaling,
        )
        if call.causal:  # those come first, and cover every token once
            call.queries.of(dq).copy_(part)
        else:
            _add(dq, call.queries, part)
        for total, part in zip((dk, dv), of_keys, strict=True):
            _add(total, call.keys, part)
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


def _add(total: Tensor, place: Tiles, part: Tensor) -> None:
    tiles = place.of(total)
    if place.period:
        tiles.add_(part)
        return
    for tile, piece in zip(tiles, part, strict=True):  # the same tokens each time
        tile.add_(piece)


def _inputs(
    call: Call, query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """What the kernel takes of them, and its options for what queries see."""
    queries, keys, values = call.queries.of(query), call.keys.of(key), call.keys.of(value)
    length, seen = queries.shape[2], keys.shape[2]
    mask = None
    if call.causal and seen > length:  # where the kernel's own mask is aligned top-left
        rows = length if call.keys.period else length * call.queries.number
        mask = query.new_full((rows, seen), float("-inf")).triu_(seen - rows + 1)
        mask = mask.view(-1, 1, length, seen)
    options = {"is_causal": call.causal and mask is None, "attn_mask": mask}
    return (queries, keys, values), options


def _calls(blocks: Tensor, dtype: torch.dtype) -> list[Call]:
    """The causal calls of all segments, which cover every query once, then what is seen whole."""
    sizes = _HALF_SIZES if dtype in HALF else _SIZES
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
    return [strip for tiles in causal for strip in _strips(tiles, sizes.strip)] + whole


def _strips(tiles: Tiles, size: int) -> Iterator[Call]:
    """Causal attention of tiles, the strips of all of them that lie alike in one call; the last
    takes what is left over."""
    start, length, number, period = tiles
    starts = range(0, max(1, length - size + 1), size)
    for first, stop in zip(starts, [*starts[1:], length], strict=True):
        queries = Tiles(start + first, stop - first, number, period)
        yield Call(queries, Tiles(start, stop, number, period), causal=True)


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


def _even_tiles(key_heads: int, threads: int) -> int:
    """Tiles of a call that keep the threads busy for four fifths of its time in backward, where a
    thread takes all of a key head in a tile."""
    for number in count(1):
        tasks = number * key_heads
        if 5 * tasks >= 4 * threads * ceil(tasks / threads):
            break
    return number


def _pieces(call: Call, number: int) -> Iterator[Call]:
    """The same scores in `number` tiles or about, of keys where those are many, else of queries;
    what is left over in a call of its own."""
    tiles, length = call.queries.number, call.queries.length
    by_keys = not call.causal and call.keys.length >= max(length, number * _KEYS)
    pieces = number if by_keys else min(number, length // _SHORTEST)
    if tiles >= number or pieces < 2:
        yield call
        return
    for tile in range(tiles):
        queries, keys = (x.at(tile) for x in (call.queries, call.keys))
        for part in _split(keys if by_keys else queries, pieces):
            if by_keys:
                yield Call(queries._replace(number=part.number), part)
            else:
                stop = part.stop if call.causal else keys.stop
                yield Call(part, Tiles(keys.start, stop - keys.start, part.number), call.causal)


def _split(tile: Tiles, pieces: int) -> Iterator[Tiles]:
    each, left = divmod(tile.length, pieces)
    yield Tiles(tile.start, each, pieces, each)
    if left:
        yield Tiles(tile.stop - left, left)


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
