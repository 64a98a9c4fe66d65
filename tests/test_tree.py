"""PrefixTree against duplicated rows."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prefix_patch import PrefixTree

ROW = st.lists(st.integers(0, 2), max_size=9)


@st.composite
def batches(draw):
    """Any ragged rows over three letters: shared, identical, nested, empty (all but one), padded
    on any side, with columns to spare."""
    rows = draw(st.lists(ROW, min_size=1, max_size=7).filter(any_token))
    length = max(map(len, rows)) + draw(st.integers(0, 2))
    ids = torch.full((len(rows), length), 9)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for r, row in enumerate(rows):
        start = draw(st.sampled_from([0, length - len(row)]))
        ids[r, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[r, start : start + len(row)] = 1
    counted = draw(st.booleans())
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0) if counted else None


def any_token(rows):
    return any(rows)


def row_paths(ids, mask, positions):
    """For every real cell, the (token, position) pairs of its row up to and including it."""
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    paths = {}
    for r, row_mask in enumerate(mask.bool()):
        cells = row_mask.nonzero()[:, 0].tolist()
        symbols = [(int(ids[r, c]), int(positions[r, c])) for c in cells]
        paths |= {(r, c): tuple(symbols[: i + 1]) for i, c in enumerate(cells)}
    return paths


@given(batches())
@settings(deadline=None, max_examples=200)
def test_packed_row_holds_each_distinct_path_once(batch):
    """The definition: one packed token for every distinct (token, position) history."""
    ids, mask, _ = batch
    tree = PrefixTree.from_rows(*batch)
    paths = row_paths(*batch)
    assert tree.packed_tokens == len(set(paths.values()))
    assert tree.row_tokens == len(paths) == int(mask.sum())
    cells = [divmod(cell, ids.shape[1]) for cell in tree.cell.tolist()]
    by_packed = {}
    for cell, packed in zip(cells, tree.packed_index.tolist(), strict=True):
        assert by_packed.setdefault(packed, paths[cell]) == paths[cell]
    assert len(by_packed) == tree.packed_tokens


@given(batches())
@settings(deadline=None, max_examples=200)
def test_round_trip(batch):
    """Rows to packed to rows gives the rows back, zeros in the padding."""
    ids, mask, _ = batch
    tree = PrefixTree.from_rows(*batch)
    assert torch.equal(tree.unpack(tree.pack(ids)), ids * mask)
    packed = torch.randn(1, tree.packed_tokens, 2)
    assert torch.equal(tree.pack(tree.unpack(packed)), packed)


@given(batches())
@settings(deadline=None, max_examples=200)
def test_descriptors_spell_the_paths(batch):
    """Query i of a segment sees exactly the tokens of its own history, bottom-right aligned."""
    tree = PrefixTree.from_rows(*batch)
    ids, _, positions = batch
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    symbols = list(zip(tree.pack(ids)[0].tolist(), tree.pack(positions)[0].tolist(), strict=True))
    histories = set(row_paths(*batch).values())
    kwargs = tree.model_kwargs()
    cu_q, cu_k = kwargs["tree_cu_seqlens_q"].tolist(), kwargs["tree_cu_seqlens_k"].tolist()
    kv_index = kwargs["tree_kv_index"].tolist()
    seen = set()
    for s, (q0, q1) in enumerate(pairwise(cu_q)):
        keys = kv_index[cu_k[s] : cu_k[s + 1]]
        assert keys[-(q1 - q0) :] == list(range(q0, q1))
        for query in range(q0, q1):
            visible = keys[: len(keys) - (q1 - 1 - query)]
            seen.add(tuple(symbols[k] for k in visible))
    assert seen == histories
    assert cu_q[-1] == tree.packed_tokens
    assert kwargs["tree_max_seqlen_q"] == max(np.diff(cu_q))
    assert kwargs["tree_max_seqlen_k"] == max(np.diff(cu_k))
    assert torch.equal(kwargs["position_ids"], tree.pack(positions))


@given(batches())
@settings(deadline=None, max_examples=100)
def test_segments_are_depth_first(batch):
    """Parents precede children, and a child's path is its parent's path and itself."""
    tree = PrefixTree.from_rows(*batch)
    cu_k, kv = tree.cu_seqlens_k.tolist(), tree.kv_index.tolist()
    paths = [kv[a:b] for a, b in pairwise(cu_k)]
    for s, parent in enumerate(tree.parents):
        assert parent < s
        own = tree.segment_lengths[s]
        assert paths[s][:-own] == (paths[parent] if parent >= 0 else [])
        assert tree.path_lengths[s] == len(paths[s])
    # A segment ends only where the trie branches or a row ends.
    ends = {tree.packed_index[tree.cell == c].item() for c in last_cells(batch)}
    for s, length in enumerate(tree.segment_lengths):
        children = tree.parents.count(s)
        last = sum(tree.segment_lengths[:s]) + length - 1
        assert children != 1 or last in ends


def last_cells(batch):
    ids, mask, _ = batch
    for r, row in enumerate(mask.bool()):
        if row.any():
            yield r * ids.shape[1] + int(row.nonzero().max())


@given(batches())
@settings(deadline=None, max_examples=200)
def test_descriptors_give_the_tree_back(batch):
    """All of it but the rows, of which those remain that no other continues."""
    tree = PrefixTree.from_rows(*batch)
    kwargs = {name: x for name, x in tree.model_kwargs().items() if isinstance(x, torch.Tensor)}
    got = PrefixTree.from_descriptors(**kwargs)
    assert got.parents == tree.parents
    assert got.segment_lengths == tree.segment_lengths
    for name in ("kv_index", "cu_seqlens_q", "cu_seqlens_k", "position_ids"):
        assert torch.equal(getattr(got, name), getattr(tree, name)), name
    packed = torch.arange(tree.packed_tokens)[None]
    assert torch.equal(got.pack(got.unpack(packed)), packed)
    leaves = set(range(len(tree.parents))) - set(tree.parents)
    assert got.num_rows == len(leaves)
    assert got.row_tokens == sum(tree.path_lengths[leaf] for leaf in leaves)


@pytest.mark.parametrize(
    ("ends", "paths"),
    [
        pytest.param([2, 3, 4], [[0, 1], [0, 1, 2], [0, 3]], id="branches inside of a segment"),
        pytest.param([2, 3, 4], [[0, 1], [0, 1, 2], [1, 3]], id="a key left out"),
        pytest.param([2, 3, 4], [[0, 1], [0, 1, 2], [0, 1, 1, 3]], id="a key twice"),
        pytest.param([2, 3, 4], [[0, 1], [0, 1, 2], [1, 0, 3]], id="keys in another order"),
        pytest.param([1, 2, 3, 4], [[0], [0, 1], [0, 2], [0, 1, 2, 3]], id="two branches in one"),
        pytest.param([1, 2, 3, 4], [[0], [0, 1], [0, 2], [0, 1, 3]], id="not depth-first"),
    ],
)
def test_descriptors_that_backends_would_read_otherwise(ends, paths):
    """They go by the parents of segments, in depth-first order."""
    depth = [0, 1, 2, 2] if len(ends) == 3 else [0, 1, 1, 2]
    bounds = torch.tensor([0, *map(len, paths)]).cumsum(0)
    keys = torch.tensor([key for path in paths for key in path])
    with pytest.raises(ValueError, match=rf"segment {len(ends) - 1} of .* lay them out depth-firs"):
        PrefixTree.from_descriptors(torch.tensor([depth]), keys, torch.tensor([0, *ends]), bounds)


@given(batches())
@settings(deadline=None, max_examples=100)
def test_gradients_sum_over_duplicates(batch):
    """unpack's gradient is pack-of-sums: a shared token receives what all its rows send."""
    tree = PrefixTree.from_rows(*batch)
    packed = torch.zeros(1, tree.packed_tokens, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tree.num_rows, tree.row_length, dtype=torch.float64)
    (tree.unpack(packed) * weights).sum().backward()
    want = torch.zeros(tree.packed_tokens, dtype=torch.float64)
    for cell, index in zip(tree.cell.tolist(), tree.packed_index.tolist(), strict=True):
        want[index] += weights.flatten()[cell]
    torch.testing.assert_close(packed.grad[0], want)


def test_plan_of_a_pair_by_hand():
    """Prompt 5 6, chosen 7 8, rejected 9: three segments."""
    tree = PrefixTree.from_rows([[5, 6, 7, 8], [5, 6, 9, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]])
    assert tree.source.tolist() == [0, 1, 2, 3, 6]
    assert tree.parents == (-1, 0, 0)
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert tree.cu_seqlens_k.tolist() == [0, 2, 6, 9]
    assert tree.kv_index.dtype == torch.int64
    assert tree.cu_seqlens_q.dtype == tree.cu_seqlens_k.dtype == torch.int32


def test_complex_numbers_are_no_ids():
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"input_ids is of torch\.complex64"):
        PrefixTree.from_rows(ids.to(torch.complex64))
    with pytest.raises(TypeError, match=r"attention_mask is of torch\.complex64"):
        PrefixTree.from_rows(ids, ids.to(torch.complex64))


def test_a_row_alone_and_identical_rows():
    assert PrefixTree.from_rows([[1, 2, 3]]).parents == (-1,)
    tree = PrefixTree.from_rows([[1, 2, 3]] * 3)
    assert (tree.packed_tokens, tree.parents) == (3, (-1,))


def test_equal_tokens_in_other_columns_are_not_one():
    """Left padding: a shift is another position, and another angle of the rotary embedding."""
    ids, mask = [[0, 5, 6], [5, 6, 7]], [[0, 1, 1], [1, 1, 1]]
    assert PrefixTree.from_rows(ids, mask).packed_tokens == 5
    assert PrefixTree.from_rows(ids, mask, [[0, 0, 1], [0, 1, 2]]).packed_tokens == 3


def test_sharing_starts_at_the_first_token():
    """The same token after different ones is not shared."""
    assert PrefixTree.from_rows([[1, 5], [2, 5]]).packed_tokens == 4


def test_one_row_of_positions_serves_all_rows():
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    tree = PrefixTree.from_rows(ids, None, torch.arange(3)[None] + 7)
    assert tree.position_ids.tolist() == [[7, 8, 9, 9]]


def test_ids_in_the_padding_may_be_anything():
    tree = PrefixTree.from_rows([[1, 2], [1, -100]], [[1, 1], [1, 0]])
    assert tree.packed_tokens == 2


def test_to_moves_every_tensor():
    tree = PrefixTree.from_rows([[1, 2], [1, 3]]).to("meta")
    assert {tree.source.device.type, tree.kv_index.device.type, tree.cell.device.type} == {"meta"}
    assert tree.parents == (-1, 0, 0)
