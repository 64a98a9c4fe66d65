"""Prefix tries as index arrays: from the rows of a batch, or back from a packed row's descriptors.

Knows numpy only.
"""

from __future__ import annotations

import numpy as np


def trie_of_rows(symbols: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The trie of `[R, L]` symbols (token and position in one int64), as index arrays.

    Rows sorted as byte strings visit the trie depth-first: each row shares with the row before it
    exactly what it shares with any earlier row, and adds the rest of its path to the packed row.
    """
    num_rows, length = symbols.shape
    starts, sizes = mask.argmax(1), mask.sum(1)
    tokens = [symbols[r, starts[r] : starts[r] + sizes[r]] for r in range(num_rows)]
    paths: list[np.ndarray] = [np.empty(0, np.int64)] * num_rows
    sources: list[np.ndarray] = []
    branches: list[tuple[int, int, int]] = []  # row, tokens it shares, offset of what it adds
    cuts, offset = {0}, 0
    before, before_path = np.empty(0, np.int64), np.empty(0, np.int64)
    for row in sorted(range(num_rows), key=lambda r: tokens[r].tobytes()):
        shared = common_prefix(tokens[row], before)
        added = len(tokens[row]) - shared
        path = np.concatenate([before_path[:shared], np.arange(offset, offset + added)])
        if added:
            branches.append((row, shared, offset))
            sources.append(row * length + starts[row] + np.arange(shared, len(path)))
            cuts.add(offset)
            if shared:
                cuts.add(int(path[shared - 1]) + 1)
        offset += added
        paths[row], before, before_path = path, tokens[row], path
    cu_q = np.array(sorted(cuts | {offset}), np.int64)
    parents, kv_paths = _segments(cu_q, branches, paths)
    return {
        "source": np.concatenate(sources),
        "cell": np.flatnonzero(mask.reshape(-1)),
        "packed_index": np.concatenate(paths),
        "kv_index": np.concatenate(kv_paths),
        "cu_seqlens_q": cu_q.astype(np.int32),
        "cu_seqlens_k": np.cumsum([0, *map(len, kv_paths)]).astype(np.int32),
        "parents": np.array(parents, np.int64),
    }


def trie_of_descriptors(
    position_ids: np.ndarray, kv_index: np.ndarray, cu_q: np.ndarray, cu_k: np.ndarray
) -> tuple[int, int, dict[str, np.ndarray]]:
    """The trie that a packed row's descriptors describe, a row for each path that no other goes on.

    Returns:
        Number of rows, their padded length, and index arrays as those of `trie_of_rows`.

    Raises:
        ValueError: descriptors that do not fit the packed row or one another.
    """
    _check_descriptors(len(position_ids), kv_index, cu_q, cu_k)
    before = kv_index[np.maximum(cu_k[1:] - np.diff(cu_q) - 1, 0)]
    is_root = np.diff(cu_q) == np.diff(cu_k)
    parents = np.where(is_root, -1, np.searchsorted(cu_q, before, side="right") - 1)
    leaves = np.setdiff1d(np.arange(len(parents)), parents)
    paths = [kv_index[cu_k[leaf] : cu_k[leaf + 1]] for leaf in leaves]
    length = max(map(len, paths))
    cells = [row * length + np.arange(len(path)) for row, path in enumerate(paths)]
    packed_index, cell = np.concatenate(paths), np.concatenate(cells)
    source = np.empty(len(position_ids), np.int64)
    source[packed_index[::-1]] = cell[::-1]  # of several rows the first
    plan = {
        "source": source,
        "cell": cell,
        "packed_index": packed_index,
        "position_ids": position_ids[None],
        "kv_index": kv_index,
        "cu_seqlens_q": cu_q.astype(np.int32),
        "cu_seqlens_k": cu_k.astype(np.int32),
        "parents": parents,
    }
    return len(paths), length, plan


def _segments(
    cu_q: np.ndarray, branches: list[tuple[int, int, int]], paths: list[np.ndarray]
) -> tuple[list[int], list[np.ndarray]]:
    """Parent and root-to-segment path of every segment, in packed order."""
    parents: list[int] = []
    kv_paths: list[np.ndarray] = []
    for row, shared, offset in branches:
        path = paths[row]
        first = int(np.searchsorted(cu_q, offset))
        last = int(np.searchsorted(cu_q, offset + len(path) - shared))
        for segment in range(first, last):
            if segment > first:
                parents.append(segment - 1)
            elif shared:
                parents.append(int(np.searchsorted(cu_q, path[shared - 1], side="right")) - 1)
            else:
                parents.append(-1)
            kv_paths.append(path[: shared + int(cu_q[segment + 1]) - offset])
    return parents, kv_paths


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading symbols that two 1-D arrays share."""
    shortest = min(len(a), len(b))
    differs = a[:shortest] != b[:shortest]
    first = int(differs.argmax()) if shortest else 0
    return first if shortest and differs[first] else shortest


def _check_descriptors(
    tokens: int, kv_index: np.ndarray, cu_q: np.ndarray, cu_k: np.ndarray
) -> None:
    """Refuse descriptors that are not those of a packed row of so many tokens."""
    fits = (
        len(cu_q) == len(cu_k) > 1
        and cu_q[0] == cu_k[0] == 0
        and cu_q[-1] == tokens
        and cu_k[-1] == len(kv_index)
        and bool((np.diff(cu_q) > 0).all())
        and bool((np.diff(cu_k) >= np.diff(cu_q)).all())
    )
    if fits:
        own = [np.arange(stop - n, stop) for stop, n in zip(cu_k[1:], np.diff(cu_q), strict=True)]
        # A path ends with its segment's own tokens; what is before them was laid out before.
        starts = np.repeat(cu_q[:-1], np.diff(cu_k) - np.diff(cu_q))
        inherited = np.delete(kv_index, np.concatenate(own))
        fits = np.array_equal(kv_index[np.concatenate(own)], np.arange(tokens)) and bool(
            ((inherited >= 0) & (inherited < starts)).all()
        )
    if not fits:
        raise ValueError(
            f"the tree_* descriptors ({len(cu_q)} and {len(cu_k)} boundaries, {len(kv_index)} "
            f"keys, {cu_q[-1] if len(cu_q) else 0} queries) do not describe a packed row of "
            f"{tokens} tokens; pass those of the same batch, from PrefixTree.model_kwargs() or a "
            "collator with layout='packed'"
        )
