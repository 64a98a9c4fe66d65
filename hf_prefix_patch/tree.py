"""PrefixTree: which tokens of a batch of rows are one, and how to pack and unpack them.

Knows numpy and torch, nothing of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_prefix_patch.rows import (
    ArrayLike,
    HostRows,
    check_descriptor,
    check_range,
    has_holes,
    host_rows,
    not_a_mask,
)
from hf_prefix_patch.trie import trie_of_descriptors, trie_of_rows

_MAX_TOKEN_ID = 2**31 - 1
_MAX_POSITION = 2**32 - 1
_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The plan of one batch: a prefix trie over its rows, laid out as one packed row.

    Two tokens of the batch are one token of the packed row when everything before them in their
    rows is the same *and* they stand at the same position. The trie is cut into segments where it
    branches and where a row ends; segments are laid out depth-first, a parent before its children.

    Build it with `PrefixTree.from_rows`. `R` is the number of rows, `L` their padded length, `T`
    the number of real tokens in them, `N` the number of packed tokens, `S` of segments, `K` of
    key/value rows.

    Attributes:
        num_rows: `R`.
        row_length: `L`.
        source: `[N]` int64, the cell (`row * L + column`) that each packed token is read from.
        cell: `[T]` int64, the cells that hold a real token, in row order.
        packed_index: `[T]` int64, the packed position of the token in each of those cells.
        position_ids: `[1, N]` int64, the position of each packed token.
        kv_index: `[K]` int64, root-to-segment paths end to end, as packed positions.
        cu_seqlens_q: `[S+1]` int32, segment boundaries in the packed row.
        cu_seqlens_k: `[S+1]` int32, path boundaries in `kv_index`.
        parents: `S` ints, the parent of each segment, -1 for a root.
        segment_lengths: `S` ints, tokens in each segment.

    Examples:
        >>> tree = PrefixTree.from_rows([[5, 6, 7, 8], [5, 6, 9, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]])
        >>> tree.row_tokens, tree.padded_tokens, tree.packed_tokens
        (7, 8, 5)
        >>> rows = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
        >>> tree.pack(rows)
        tensor([[5, 6, 7, 8, 9]])
        >>> tree.unpack(tree.pack(rows))
        tensor([[5, 6, 7, 8],
                [5, 6, 9, 0]])
        >>> tree.cu_seqlens_q.tolist(), tree.kv_index.tolist()
        ([0, 2, 4, 5], [0, 1, 0, 1, 2, 3, 0, 1, 4])
    """

    num_rows: int
    row_length: int
    source: Tensor
    cell: Tensor
    packed_index: Tensor
    position_ids: Tensor
    kv_index: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    parents: tuple[int, ...]
    segment_lengths: tuple[int, ...]

    @classmethod
    def from_rows(
        cls,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
    ) -> PrefixTree:
        """Plan a batch.

        Args:
            input_ids: `[R, L]` token ids in `[0, 2**31)` at real tokens.
            attention_mask: `[R, L]`, 1 or True at real tokens, which must be contiguous in each row
                (any side of padding), and 0 in the padding. None: every token is real.
            position_ids: `[R, L]` or `[1, L]` positions in `[0, 2**32)`. None: the column. Without
                a mask, a position that does not follow the one before it begins a new document,
                as for the masks of transformers; what documents begin with is shared as well.

        Returns:
            The plan, its tensors on the device of `input_ids`.

        Raises:
            ValueError: shapes that do not fit, a mask of other values or with holes, no real token,
                or an id or position out of range.
            TypeError: ids or positions that are not integers.
        """
        device = input_ids.device if isinstance(input_ids, Tensor) else _HOST
        rows = host_rows(input_ids, attention_mask, position_ids)
        if rows.numbered and attention_mask is not None:
            raise not_a_mask(attention_mask)
        if has_holes(rows.mask):
            raise ValueError(
                "attention_mask has a padded cell between real tokens, but the real tokens of each "
                "row must be contiguous; remove the tokens that are masked inside of rows, or run "
                "these rows unshared"
            )
        if not rows.mask.any():
            raise ValueError(
                "there is no real token in {} rows of {}, but a tree needs at least one; leave "
                "empty batches out".format(*rows.mask.shape)
            )
        return cls.from_host_rows(rows, device)

    @classmethod
    def from_host_rows(cls, rows: HostRows, device: torch.device = _HOST) -> PrefixTree:
        """Plan rows without holes and with a real token."""
        ids, mask, positions, documents, _ = rows
        check_range("input_ids", ids[mask], _MAX_TOKEN_ID)
        if positions is not None:
            check_range("position_ids", positions[mask], _MAX_POSITION)
        length = ids.shape[1]
        symbols = (ids << 32) | (np.arange(length) if positions is None else positions)
        if documents is None:
            starts, sizes = np.arange(0, ids.size, length) + mask.argmax(1), mask.sum(1)
        else:
            starts, sizes = documents, np.diff(documents, append=ids.size)
        plan = trie_of_rows(symbols.reshape(-1), starts, sizes)
        source = plan["source"]
        kept = source % length if positions is None else positions.flat[source]
        plan["position_ids"] = kept[None]
        return cls._of_arrays(len(ids), length, plan, device)

    @classmethod
    def from_descriptors(
        cls,
        position_ids: Tensor,
        tree_kv_index: Tensor,
        tree_cu_seqlens_q: Tensor,
        tree_cu_seqlens_k: Tensor,
    ) -> PrefixTree:
        """The plan that a packed row's descriptors describe, as `model_kwargs` gives them.

        Its rows are the paths that no other continues: descriptors do not say which rows end inside
        another one, or are equal. Reads the descriptors on the host.

        Args:
            position_ids: `[1, N]` positions of the packed tokens.
            tree_kv_index: `[K]` root-to-segment paths end to end, as packed positions.
            tree_cu_seqlens_q: `[S+1]` segment boundaries in the packed row.
            tree_cu_seqlens_k: `[S+1]` path boundaries in `tree_kv_index`.

        Returns:
            The plan, its tensors on the host.

        Raises:
            ValueError: descriptors that do not fit the packed row or one another, hold no data, or
                are not laid out depth-first in whole segments.
            TypeError: descriptors that are no tensors of integers.

        Examples:
            >>> tree = PrefixTree.from_rows([[5, 6, 7], [5, 6, 9]])
            >>> kwargs = tree.model_kwargs()
            >>> lengths = [kwargs.pop(f"tree_max_seqlen_{x}") for x in "qk"]
            >>> PrefixTree.from_descriptors(**kwargs).packed_index.tolist()
            [0, 1, 2, 0, 1, 3]
        """
        given = {
            "position_ids": position_ids,
            "tree_kv_index": tree_kv_index,
            "tree_cu_seqlens_q": tree_cu_seqlens_q,
            "tree_cu_seqlens_k": tree_cu_seqlens_k,
        }
        for name, x in given.items():
            check_descriptor(name, x)
        host = [x.detach().reshape(-1).cpu().numpy().astype(np.int64) for x in given.values()]
        num_rows, row_length, plan = trie_of_descriptors(*host)
        return cls._of_arrays(num_rows, row_length, plan, _HOST)

    @classmethod
    def _of_arrays(
        cls, num_rows: int, row_length: int, plan: dict[str, np.ndarray], device: torch.device
    ) -> PrefixTree:
        parents, lengths = plan.pop("parents"), np.diff(plan["cu_seqlens_q"])
        return cls(
            num_rows=num_rows,
            row_length=row_length,
            parents=tuple(parents.tolist()),
            segment_lengths=tuple(lengths.tolist()),
            **{name: to_device(torch.from_numpy(x), device) for name, x in plan.items()},
        )

    @property
    def row_tokens(self) -> int:
        """`T`, real tokens in the rows."""
        return self.cell.shape[0]

    @property
    def padded_tokens(self) -> int:
        """`R * L`, cells in the rows."""
        return self.num_rows * self.row_length

    @property
    def packed_tokens(self) -> int:
        """`N`, tokens in the packed row."""
        return self.source.shape[0]

    @cached_property
    def path_lengths(self) -> tuple[int, ...]:
        """`S` ints: keys on the path of each segment, its own included."""
        depths: list[int] = []
        for parent, length in zip(self.parents, self.segment_lengths, strict=True):
            depths.append(length + (depths[parent] if parent >= 0 else 0))
        return tuple(depths)

    def to(self, device: torch.device | str) -> PrefixTree:
        """The same plan with its tensors on `device`; never waits for the device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: to_device(v, device) for k, v in values.items() if isinstance(v, Tensor)}
        return PrefixTree(**(values | moved))

    def pack(self, x: Tensor) -> Tensor:
        """`[R, L, ...]` rows to the `[1, N, ...]` packed row, each shared prefix once.

        Raises:
            ValueError: `x` does not begin with `[R, L]`.
            TypeError: `x` is no tensor.
        """
        self._check_shape(x, (self.num_rows, self.row_length), "rows")
        return x.flatten(0, 1).index_select(0, self.source.to(x.device)).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """`[1, N, ...]` packed row to `[R, L, ...]` rows, zeros in the padding.

        Raises:
            ValueError: `x` does not begin with `[1, N]`.
            TypeError: `x` is no tensor.
        """
        self._check_shape(x, (1, self.packed_tokens), "the packed row")
        real = select_tokens(x[0], self.packed_index)
        if self.row_tokens == self.padded_tokens:
            rows = real
        else:
            rows = real.new_zeros(self.padded_tokens, *x.shape[2:])
            rows = rows.index_copy(0, self.cell.to(x.device), real)
        return rows.view(self.num_rows, self.row_length, *x.shape[2:])

    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the packed model call: positions and descriptors.

        Segment `s` holds queries `cu_q[s]:cu_q[s+1]` and attends to keys
        `kv_index[cu_k[s]:cu_k[s+1]]`, causal, aligned bottom-right.

        Returns:
            `position_ids` `[1, N]` int64, `tree_kv_index` `[K]` int64, `tree_cu_seqlens_q` and
            `tree_cu_seqlens_k` `[S+1]` int32, `tree_max_seqlen_q` and `tree_max_seqlen_k` ints.
        """
        return {
            "position_ids": self.position_ids,
            "tree_kv_index": self.kv_index,
            "tree_cu_seqlens_q": self.cu_seqlens_q,
            "tree_cu_seqlens_k": self.cu_seqlens_k,
            "tree_max_seqlen_q": max(self.segment_lengths),
            "tree_max_seqlen_k": max(self.path_lengths),
        }

    def _check_shape(self, x: Tensor, lead: tuple[int, int], what: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"got a {type(x).__name__}, but {what} of this tree must be a tensor that begins "
                f"with {list(lead)}; pass torch.as_tensor of it"
            )
        if tuple(x.shape[:2]) != lead:
            raise ValueError(
                f"got a tensor of shape {list(x.shape)}, but {what} of this tree must begin "
                f"with {list(lead)}; pass tensors of the batch that the tree was built from"
            )


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`[N, ...]` to `[T, ...]`, where one token may be taken many times.

    Backward adds up what it gets back in fp32 or better, as a CPU does by itself; other devices add
    in the dtype of `x`, CUDA in any order.
    """
    index = index.to(x.device)
    if x.device.type == "cpu" or not x.requires_grad:
        return x.index_select(0, index)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.index_select(0, index).to(x.dtype)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`, queued there without waiting for what the device is doing."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        # From pageable memory the copy would wait for the stream; this memory is kept until it ran.
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
