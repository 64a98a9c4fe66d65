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
    starts, sizes = mask.argmax(1).tolist(), mask.sum(1).tolist()
    tokens = [symbols[r, starts[r] : starts[r] + sizes[r]] for r in range(num_rows)]
    counted = np.arange(sum(sizes))
    source = np.empty_like(counted)
    paths: list[np.ndarray] = [counted[:0]] * num_rows
    branches: list[tuple[np.ndarray, int, int]] = []  # path, tokens shared, offset of the others
    offset, before, before_path = 0, symbols[0, :0], counted[:0]
    for row in sorted(range(num_rows), key=lambda r: tokens[r].tobytes()):
        shared = common_prefix(tokens[row], before)
        end = offset + sizes[row] - shared
        path = np.concatenate([before_path[:shared], counted[offset:end]])
        if end > offset:
            branches.append((path, shared, offset))
            first = row * length + starts[row] + shared
            source[offset:end] = np.arange(first, first + end - offset)
        paths[row], before, before_path, offset = path, tokens[row], path, end
    return {
        "source": source[:offset].copy(),
        "cell": np.flatnonzero(mask.reshape(-1)),
        "packed_index": np.concatenate(paths),
        **_segments(branches, offset),
    }


def _segments(branches: list[tuple[np.ndarray, int, int]], tokens: int) -> dict[str, np.ndarray]:
    """Boundaries, parents and root-to-segment paths of the segments, in packed order.

    Args:
        branches: of each row that adds tokens, in packed order: its path, how many of its tokens an
            earlier row has, and where the others begin in the packed row.
        tokens: in the packed row.
    """
    offsets = np.array([offset for _, _, offset in branches])
    forks = [int(path[shared - 1]) + 1 for path, shared, _ in branches if shared]
    cu_q = np.unique(np.concatenate([offsets, np.array([tokens, *forks])]))
    of_branch = np.searchsorted(offsets, cu_q[:-1], side="right") - 1
    shared = np.array([shared for _, shared, _ in branches])
    # How many tokens stand above each segment on its path, and at its end.
    above = shared[of_branch] + cu_q[:-1] - offsets[of_branch]
    below = (above + np.diff(cu_q)).tolist()
    own = [branches[branch][0] for branch in of_branch.tolist()]
    last = np.array([path[n - 1] if n else -1 for path, n in zip(own, above.tolist(), strict=True)])
    kv_paths = [path[:n] for path, n in zip(own, below, strict=True)]
    return {
        "kv_index": np.concatenate(kv_paths),
        "cu_seqlens_q": cu_q.astype(np.int32),
        "cu_seqlens_k": np.cumsum([0, *below]).astype(np.int32),
        "parents": np.searchsorted(cu_q, last, side="right") - 1,
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
