"""Prefix tries as index arrays: from the rows of a batch, or back from a packed row's descriptors.

Knows numpy only.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np


def trie_of_rows(
    symbols: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> dict[str, np.ndarray]:
    """The trie of rows that lie in cells one after another, as index arrays.

    Rows sorted as byte strings visit the trie depth-first: each row shares with the row before it
    exactly what it shares with any earlier row, and adds the rest of its path to the packed row.

    Args:
        symbols: int64, token and position in one, of every cell.
        starts: of each row, its first cell.
        sizes: of each row, how many cells it has.
    """
    num_rows, ends = len(starts), np.cumsum(sizes)
    firsts, counts, stops = starts.tolist(), sizes.tolist(), ends.tolist()
    tokens = [symbols[first : first + n] for first, n in zip(firsts, counts, strict=True)]
    packed_index, numbers = np.empty(stops[-1], np.int64), np.arange(stops[-1])
    paths = [packed_index[stop - n : stop] for stop, n in zip(stops, counts, strict=True)]
    branches: list[tuple[int, int, int, int]] = []
    cuts, offset = {0}, 0
    before, before_path = symbols[:0], numbers[:0]
    for row in sorted(range(num_rows), key=lambda r: tokens[r].tobytes()):
        path, shared = paths[row], common_prefix(tokens[row], before)
        path[:shared] = before_path[:shared]
        added = counts[row] - shared
        if added:
            path[shared:] = numbers[offset : offset + added]
            parent = int(path[shared - 1]) if shared else -1
            branches.append((row, shared, offset, parent))
            cuts |= {offset, parent + 1}
            offset += added
        before, before_path = tokens[row], path
    rows, common, offsets, _ = np.array(branches).T
    # From the place of an added token in the packed row to its cell.
    shift = starts[rows] + common - offsets
    return {
        "source": numbers[:offset] + np.repeat(shift, np.diff(offsets, append=offset)),
        "cell": numbers + np.repeat(starts + sizes - ends, sizes),
        "packed_index": packed_index,
        **_segments(sorted(cuts | {offset}), branches, paths),
    }


def _segments(
    cu_q: list[int], branches: list[tuple[int, int, int, int]], paths: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """Boundaries, parents and root-to-segment paths of the segments, in packed order.

    Args:
        cu_q: where segments begin, and the end of the last.
        branches: of each row that adds tokens, in packed order: the row, how many of its tokens an
            earlier row has, where the others begin in the packed row, and the token before those.
        paths: of every row, as packed positions.
    """
    parents: list[int] = []
    kv_paths: list[np.ndarray] = []
    stops = [*(offset for _, _, offset, _ in branches[1:]), cu_q[-1]]
    for (row, shared, offset, parent), stop in zip(branches, stops, strict=True):
        above = bisect_right(cu_q, parent) - 1
        while cu_q[len(parents)] < stop:
            parents.append(above)
            above = len(parents) - 1
            kv_paths.append(paths[row][: shared + cu_q[len(parents)] - offset])
    return {
        "kv_index": np.concatenate(kv_paths),
        "cu_seqlens_q": np.array(cu_q, np.int32),
        "cu_seqlens_k": np.cumsum([0, *map(len, kv_paths)], dtype=np.int32),
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
    paths, own = np.split(kv_index, cu_k[1:-1]), np.diff(cu_q)
    before = kv_index[np.maximum(cu_k[1:] - own - 1, 0)]
    is_root = own == np.diff(cu_k)
    parents = np.where(is_root, -1, np.searchsorted(cu_q, before, side="right") - 1)
    inherited = [path[: len(path) - n] for path, n in zip(paths, own.tolist(), strict=True)]
    _check_paths(parents.tolist(), paths, inherited)
    rows = [paths[leaf] for leaf in np.setdiff1d(np.arange(len(parents)), parents)]
    length = max(map(len, rows))
    cells = [row * length + np.arange(len(path)) for row, path in enumerate(rows)]
    packed_index, cell = np.concatenate(rows), np.concatenate(cells)
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
    return len(rows), length, plan


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


def _check_paths(parents: list[int], paths: list[np.ndarray], inherited: list[np.ndarray]) -> None:
    """Refuse paths that backends would read as others: they go by parents, and by order.

    Args:
        parents: of each segment, that of the last key before its own.
        paths: of each segment, as packed positions.
        inherited: the same without the segment's own tokens.
    """
    open_segments: list[int] = []  # from a root to the segment before
    for segment, (parent, keys) in enumerate(zip(parents, inherited, strict=True)):
        while open_segments and open_segments[-1] != parent:
            open_segments.pop()
        if not np.array_equal(keys, paths[parent] if open_segments else keys[:0]):
            raise ValueError(
                f"segment {segment} of the tree_* descriptors, counted from 0, has the keys "
                f"{_shown(keys)} before its own, but they must be the whole path of the segment "
                "before it or of one on that path; end segments where others branch off and lay "
                "them out depth-first, as PrefixTree.model_kwargs() does"
            )
        open_segments.append(segment)


def _shown(keys: np.ndarray) -> str:
    first = ", ".join(map(str, keys[:8]))
    return f"[{first}{', ...' if len(keys) > 8 else ''}]"
