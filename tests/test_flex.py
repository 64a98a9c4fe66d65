"""The flex backend: its block-sparse mask, and its forward pass (it has no backward on a CPU)."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from batches import packed_inputs, tree_of_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import batches
from torch.nn.attention.flex_attention import flex_attention

from hf_prefix_patch import PrefixTree
from hf_prefix_patch.backends import flex
from hf_prefix_patch.backends.base import Needs
from hf_prefix_patch.reference import duplicated_rows_attention

CPU = torch.device("cpu")


def test_a_window_that_was_not_planned_is_refused():
    inputs = packed_inputs(PrefixTree.from_rows([[1, 2], [1, 3]]))
    message = r"passes the sliding window 3, but its config says \[None\]; pass backend=.sdpa"
    with pytest.raises(NotImplementedError, match=message):
        flex.flex_attend(
            torch.nn.Module(), *inputs, scaling=1.0, sliding_window=3, tree_block_masks={None: None}
        )


def visible(tree, window):
    """`[N, N]` bool from the public descriptors: what each packed token sees."""
    seen = torch.zeros(tree.packed_tokens, tree.packed_tokens, dtype=torch.bool)
    cu_q, cu_k = tree.cu_seqlens_q.tolist(), tree.cu_seqlens_k.tolist()
    for s in range(len(cu_q) - 1):
        path = tree.kv_index[cu_k[s] : cu_k[s + 1]]
        for query in range(cu_q[s], cu_q[s + 1]):
            at = len(path) - (cu_q[s + 1] - query)
            first = 0 if window is None else max(0, at + 1 - window)
            seen[query, path[first : at + 1]] = True
    return seen


def mask_of(block_mask):
    """`[N, N]` bool that the blocks together with the mask function stand for, and what the blocks
    alone say: nothing, some or every entry."""
    n, m = block_mask.seq_lengths
    q, kv = torch.arange(n)[:, None], torch.arange(m)[None]
    zero = torch.tensor(0)
    exact = block_mask.mask_mod(zero, zero, q, kv)
    blocks = torch.zeros(2, -(-n // 128), -(-m // 128), dtype=torch.bool)
    lists = (
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    )
    for kind, (counts, indices) in enumerate(lists):
        for row, count in enumerate(counts[0, 0].tolist()):
            blocks[kind, row, indices[0, 0, row, :count].long()] = True
    partial, full = blocks.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :n, :m]
    assert not (partial & full).any()
    return (partial & exact) | full, partial | full


@pytest.mark.parametrize(
    ("sizes", "dtype", "memory", "forward", "backward"),
    [
        ({64, 128}, torch.bfloat16, 99, None, None),
        ({64}, torch.float32, 99, None, None),
        ({256}, torch.bfloat16, 227, None, None),
        ({192, 128}, torch.float16, 227, None, None),
        ({256}, torch.float32, 227, None, None),
        ({192, 128}, torch.bfloat16, 99, 32, 32),
        ({256}, torch.float16, 99, 32, 32),
        ({80}, torch.float32, 163, 32, None),
        ({256, 512}, torch.bfloat16, 227, 32, None),
    ],
)
def test_tiles_fit_into_the_shared_memory_of_the_card(
    monkeypatch, sizes, dtype, memory, forward, backward
):
    """`memory` in KiB. What each took was read off the kernels that torch 2.11 compiles."""
    card = SimpleNamespace(shared_memory_per_block_optin=memory * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(flex, "tree_block_mask", lambda *args: None)
    needs = Needs(
        torch.device("cuda"), dtype, "sdpa", frozenset(sizes), frozenset({None}), frozenset()
    )
    tiles = flex.FLEX.plan(PrefixTree.from_rows([[1]]), needs)["tree_tiles"] or {}
    assert tiles.get("fwd_BLOCK_M") == tiles.get("fwd_BLOCK_N") == forward
    assert tiles.get("bwd_BLOCK_M1") == tiles.get("bwd_BLOCK_N2") == backward
    monkeypatch.setattr(torch.version, "hip", "7.0")  # PyTorch chooses others there
    assert flex.FLEX.plan(PrefixTree.from_rows([[1]]), needs)["tree_tiles"] is None


@given(batches(), st.sampled_from([None, 1, 2, 5]))
@settings(deadline=None, max_examples=100)
def test_mask_is_what_the_descriptors_say(batch, window):
    tree = PrefixTree.from_rows(*batch)
    mask, _ = mask_of(flex.tree_block_mask(tree, window, CPU))
    assert torch.equal(mask, visible(tree, window))


def long_tree():
    start, more = list(range(300)), list(range(500, 840))
    rows = [start + more + [1000] * 90, start + more + [1001] * 3, start + [1002] * 400, [3] * 200]
    return tree_of_rows(rows)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 300, 5000])
def test_blocks_of_a_long_row(window):
    """Whole blocks are left out or taken without looking, and none wrongly."""
    tree = long_tree()
    mask, blocks = mask_of(flex.tree_block_mask(tree, window, CPU))
    want = visible(tree, window)
    assert torch.equal(mask, want)
    assert blocks.sum() < 0.75 * blocks.numel()
    if window is None:
        n = tree.packed_tokens // 128
        needed = want[: n * 128, : n * 128].view(n, 128, n, 128).any(3).any(1)
        taken = blocks[: n * 128, : n * 128].view(n, 128, n, 128).any(3).any(1)
        assert torch.equal(taken, needed)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_forward_equals_duplicated_rows(monkeypatch, window, softcap):
    """Uncompiled: the operator's own reference, which reads the same mask."""
    monkeypatch.setattr(flex, "_compiled_flex", lambda: flex_attention)
    tree = long_tree()
    inputs = [x.detach() for x in packed_inputs(tree)]
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    masks = {window: flex.tree_block_mask(tree, window, CPU)}
    got = flex.flex_attend(None, *inputs, **options, tree_block_masks=masks)
    want = duplicated_rows_attention(tree, *inputs, **options)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_sinks_take_their_share(monkeypatch):
    """By the log-sum-exp, which the kernel has on CUDA only: here an emulator returns it."""

    def emulated(q, k, v, score_mod, block_mask, scale, enable_gqa, kernel_options, return_aux):
        assert return_aux.lse
        assert kernel_options == {"fwd_BLOCK_M": 32}
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scale
        scores = scores.masked_fill(~visible(tree, None), -torch.inf)
        aux = type("Aux", (), {"lse": scores.logsumexp(-1)})
        return scores.softmax(-1) @ v, aux

    monkeypatch.setattr(flex, "_compiled_flex", lambda: emulated)
    tree = PrefixTree.from_rows([[1, 2, 3, 4], [1, 2, 5, 6]])
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    inputs = [*packed_inputs(tree), sinks]
    masks = {None: flex.tree_block_mask(tree, None, CPU)}
    planned = {"tree_block_masks": masks, "tree_tiles": {"fwd_BLOCK_M": 32}}
    got = flex.flex_attend(None, *inputs[:3], scaling=0.3, s_aux=sinks, **planned)
    want = duplicated_rows_attention(tree, *inputs[:3], scaling=0.3, s_aux=sinks)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    grads = (torch.autograd.grad(x.sin().sum(), inputs) for x in (got, want))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_a_window_that_the_config_does_not_tell_of_is_refused():
    tree = PrefixTree.from_rows([[1, 2, 3, 4], [1, 2, 5, 6]])
    masks = {None: flex.tree_block_mask(tree, None, CPU)}
    options = {"scaling": 0.3, "sliding_window": 3, "tree_block_masks": masks}
    message = (
        r'Linear passes the sliding window 3, but its config says \[None\]; pass backend="sdpa"'
    )
    with pytest.raises(NotImplementedError, match=message):
        flex.flex_attend(torch.nn.Linear(1, 1), *packed_inputs(tree), **options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch on loading its compiler
def test_soft_caps_and_windows_of_several_models_are_compiled():
    """The kernel check comes first, with a cap and a window of its own; so has a compiled layer."""
    from torch._inductor.utils import fresh_cache

    tree = PrefixTree.from_rows([[*range(40), 100], [*range(40), 200]])
    inputs = [x.detach().float() for x in packed_inputs(tree, size=16)]
    masks = {window: flex.tree_block_mask(tree, window, CPU) for window in (None, 7, 20)}
    flex._compiled_flex.cache_clear()
    torch.compiler.reset()
    with fresh_cache(), torch.no_grad():
        compiled = torch.compile(flex.flex_attend, fullgraph=True)
        for attend, softcap, window in [
            (flex.flex_attend, 5.0, None),
            (flex.flex_attend, 30.0, 7),
            (compiled, 50.0, 20),
            (flex.flex_attend, 7.0, 20),
        ]:
            options = {"scaling": 0.3, "softcap": softcap, "sliding_window": window}
            got = attend(None, *inputs, **options, tree_block_masks=masks)
            want = duplicated_rows_attention(tree, *inputs, **options)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_many_kinds_of_calls_are_compiled_and_one_too_many_raises(monkeypatch):
    """More than the compiler's own limit, beyond which it would run unfused, without a word."""
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._dynamo.utils import counters

    tree = PrefixTree.from_rows([[1, 2, 3, 4], [1, 2, 5, 6]])
    masks = {None: flex.tree_block_mask(tree, None, CPU)}
    monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(flex, "_KINDS", 12)
    flex._compiled_flex.cache_clear()
    torch.compiler.reset()
    counters.clear()

    def attend(size):
        inputs = [x.detach() for x in packed_inputs(tree, size=size)]
        got = flex.flex_attend(None, *inputs, scaling=0.3, tree_block_masks=masks)
        want = duplicated_rows_attention(tree, *inputs, scaling=0.3)
        torch.testing.assert_close(got, want)

    try:
        for size in range(1, 13):
            attend(size)
        assert counters["stats"]["unique_graphs"] == 12
        with pytest.raises(FailOnRecompileLimitHit):
            attend(13)
    finally:
        flex._compiled_flex.cache_clear()
        torch.compiler.reset()
