"""Which calls of the kernel compute attention of the packed row on a CPU.

A segment attends to itself, causal, and all of its descendants together to the whole of it. Long
segments are halved again and again: two causal halves, and a whole tile of the later queries on the
earlier keys. Of what is left the kernel would compute all scores, as its causal mode skips whole
blocks of 512 keys only: it is cut into strips of queries, each on the keys up to its end.
Backward cuts further: there a thread takes all of a key head in a tile.

Siblings never meet in a call: NaN and infinity would come through a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_prefix_patch.backends.base import HALF


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

    def tokens(self) -> NDArray[np.int64]:
        """`[number, length]`."""
        starts = self.start + self.period * np.arange(self.number)
        return starts[:, None] + np.arange(self.length)

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
    causal: bool = False  # the last query sees its keys; tiles on the same keys follow each other
    mask: Tensor | None = None  # of a causal call, where the kernel's own causal mode is not enough


@lru_cache(maxsize=2)  # forward and backward, for every layer of a batch
def kernel_calls(
    blocks: tuple[tuple[int, ...], ...], dtype: torch.dtype, pieces: int = 1
) -> tuple[Call, ...]:
    """The causal calls of all segments, which cover every query once, then what is seen whole.

    Args:
        blocks: of `segment_blocks(tree)`.
        dtype: that the kernel is given.
        pieces: tiles that a call is cut into where it has fewer, of `even_tiles`.
    """
    calls = _calls(blocks, _HALF_SIZES if dtype in HALF else _SIZES)
    cut = [piece for call in calls for piece in _pieces(call, pieces)]
    return tuple(call._replace(mask=_mask(call, dtype)) for call in cut)


def _calls(blocks: tuple[tuple[int, ...], ...], sizes: Sizes) -> list[Call]:
    causal: list[Tiles] = []
    whole: list[Call] = []
    for q0, q1, k0, k1 in blocks:
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


def _mask(call: Call, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of a causal call, `[tiles, 1, queries, keys]`, or one for all
    tiles; None where the kernel's own causal mode will do."""
    if not call.causal or call.queries == call.keys:
        return None
    same = call.queries.period == call.keys.period
    queries, keys = (x.at(0) if same else x for x in (call.queries, call.keys))
    hidden = keys.tokens()[:, None] > queries.tokens()[:, :, None]
    mask = np.where(hidden, np.float32("-inf"), np.float32(0))
    return torch.from_numpy(mask[:, None]).to(dtype)


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


def even_tiles(key_heads: int, threads: int) -> int:
    """Tiles of a call that keep the threads busy for four fifths of its time in backward, where a
    thread takes all of a key head in a tile."""
    tasks = count(key_heads, key_heads)
    enough = next(n for n in tasks if 5 * n >= 4 * threads * ceil(n / threads))
    return enough // key_heads


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
