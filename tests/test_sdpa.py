"""The sdpa backend against attention on duplicated rows, in all its ways to compute."""

import random

import pytest
import torch
from batches import assert_equals_duplicated_rows, packed_inputs, tree_of_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import batches
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from hf_prefix_patch import PrefixTree
from hf_prefix_patch.backends import cpu, sdpa, tiles
from hf_prefix_patch.backends.base import as_tensor, chain_blocks, segment_blocks
from hf_prefix_patch.measuring import TensorMemory
from hf_prefix_patch.reference import duplicated_rows_attention

aten = torch.ops.aten


def attend(tree, inputs, **options):
    plan = sdpa.SDPA.plan(tree, None)
    return sdpa.sdpa_attend(None, *inputs, scaling=0.3, **options, **plan)


def as_operator(tree, inputs, sinks=None, dropout=0.0, window=None, softcap=None):
    """What a compiled layer calls."""
    blocks, seed = sdpa.SDPA.plan(tree, None)["tree_blocks"], torch.tensor([7]) if dropout else None
    return sdpa.chain_attention(*inputs, sinks, blocks, seed, 0.3, dropout, window, softcap)


def assert_all_ways_equal(tree, **options):
    inputs = packed_inputs(tree)
    if options.pop("sinks", False):
        options["s_aux"] = torch.randn(4, dtype=torch.float64, requires_grad=True)
        inputs.append(options["s_aux"])
    assert_equals_duplicated_rows(tree, attend(tree, inputs[:3], **options), inputs, **options)
    named = {"window": options.get("sliding_window"), "softcap": options.get("softcap")}
    got = as_operator(tree, inputs[:3], options.get("s_aux"), **named)
    assert_equals_duplicated_rows(tree, got, inputs, **options)


@given(batches(), st.sampled_from([None, 1, 2, 3, 5]), st.sampled_from([None, 1.5]), st.booleans())
@settings(deadline=None, max_examples=150)
def test_equals_duplicated_rows(batch, window, softcap, sinks):
    """Output and gradients in fp64, any tree, windows, soft caps and sinks."""
    tree = PrefixTree.from_rows(*batch)
    assert_all_ways_equal(tree, sliding_window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("prefix", [1, 6, 40, 300])
@pytest.mark.parametrize("window", [None, 4, 30, 280])
@pytest.mark.parametrize("sinks", [False, True])
def test_short_and_long_prefixes(prefix, window, sinks):
    """Both ways to align a chain with the keys ahead of it, and the cuts that a window allows."""
    start = list(range(prefix))
    rows = [start + [1000] * 290, start + [1001] * 290]
    tree = PrefixTree.from_rows(rows)
    assert_all_ways_equal(tree, sliding_window=window, sinks=sinks)


def calls_of(tree, dtype=torch.float32, pieces=1):
    return tiles.kernel_calls(tuple(segment_blocks(tree)), dtype, pieces)


def places_of(tree, dtype=torch.float32):
    """The calls without their masks, which cannot be compared as a whole."""
    return [call._replace(mask=None) for call in calls_of(tree, dtype)]


def test_groups_share_one_call_on_their_prompt():
    """Eight responses of a prompt, three calls: the prompt, the triangles of the responses, and one
    tile of them all on the prompt."""
    tree = PrefixTree.from_rows([[1, 2, 3, 10 + r, 20 + r] for r in range(8)])
    prompt, responses = tiles.Tiles(0, 3), tiles.Tiles(3, 2, 8, 2)
    assert places_of(tree) == [
        tiles.Call(prompt, prompt, causal=True),
        tiles.Call(responses, responses, causal=True),
        tiles.Call(tiles.Tiles(3, 16), prompt),
    ]


def scores_of(calls, n):
    """`[n, n]`: how often each query is computed on each key."""
    index = torch.arange(n, dtype=torch.float64).view(1, 1, n, 1)
    scores = torch.zeros(n, n, dtype=torch.int64)
    for call in calls:
        (queries, keys, _), seen = cpu._inputs(call, index, index, index)
        mask, shape = seen["attn_mask"], (queries.shape[2], keys.shape[2])
        if mask is None:
            mask = torch.zeros(shape) if not seen["is_causal"] else torch.full(shape, -1.0).triu(1)
        masks = mask.expand(len(queries), 1, *shape)[:, 0] == 0
        for rows, columns, visible in zip(queries[:, 0], keys[:, 0], masks, strict=True):
            scores[rows.long(), columns.long().T] += visible.long()
    return scores


def seen_in_reference(tree):
    """`[n, n]` bool: which keys the queries of duplicated rows see."""
    inputs = [torch.eye(tree.packed_tokens, dtype=torch.float64)[None, None] for _ in range(3)]
    return duplicated_rows_attention(tree, *inputs, scaling=0.0)[0, :, 0] > 0


@pytest.mark.parametrize("length", [511, 512, 700, 1024, 1300, 2300])
@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_cover_what_is_visible_once(length, pieces, dtype):
    """Long chains are halved and what is left cut into strips; with threads that key heads would
    leave idle, all are cut further, and a number that does not divide leaves some over."""
    rows = [list(range(length)), [*range(length - 300), *range(5000, 5400)]]
    tree = tree_of_rows(rows)
    scores = scores_of(calls_of(tree, dtype, pieces), tree.packed_tokens)
    assert torch.equal(scores, seen_in_reference(tree).long())


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_tiles_of_any_tree_cover_what_is_visible_once(seed, pieces):
    """Nested branches of any length, several roots."""
    draw = random.Random(seed)
    tree = tree_of_rows([row for _ in range(2) for row in branches(draw, 200)])
    scores = scores_of(calls_of(tree, pieces=pieces), tree.packed_tokens)
    assert torch.equal(scores, seen_in_reference(tree).long())


def branches(draw, longest):
    """Rows of one random tree whose segments get shorter with their depth."""
    stem = [draw.randrange(10**6) for _ in range(draw.randint(1, longest))]
    if longest < 20 or draw.random() < 0.3:
        return [stem]
    children = [branches(draw, longest // 2) for _ in range(draw.randint(2, 3))]
    return [stem + row for child in children for row in child]


def prompt_and_responses(prompt, *responses):
    first = len(responses) + sum(responses) + prompt
    return [[*range(prompt), *[first + r] * n] for r, n in enumerate(responses)]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_siblings_do_not_reach_each_other(poison):
    """Whatever is in one response: it would come through a mask."""
    tree = tree_of_rows(prompt_and_responses(40, 50, 75))
    inputs = packed_inputs(tree)
    want = attend(tree, inputs).detach()
    with torch.no_grad():
        for x in inputs:
            x[:, :, 40:90] = poison
    output = attend(tree, inputs)
    clean = torch.tensor([*range(40), *range(90, 165)])
    assert torch.equal(output[:, clean], want[:, clean])
    grads = torch.autograd.grad(output[:, 90:].sum(), inputs)
    assert all(grad[:, :, 90:].isfinite().all() for grad in grads)


def test_a_batch_is_planned_once_for_all_layers():
    """Forward and backward differ where there are threads to keep busy."""
    tree = tree_of_rows(prompt_and_responses(140, 50, 75))
    tiles.kernel_calls.cache_clear()
    for _ in range(3):
        inputs = packed_inputs(tree)
        attend(tree, inputs).sum().backward()
    seen = tiles.kernel_calls.cache_info()
    assert (seen.misses, seen.hits) == (2, 4)


def test_what_was_planned_without_autograd_serves_training():
    tree = tree_of_rows(prompt_and_responses(140, 50, 75))
    tiles.kernel_calls.cache_clear()
    with torch.inference_mode():
        attend(tree, [x.detach().clone() for x in packed_inputs(tree)])
    inputs = packed_inputs(tree)
    assert_equals_duplicated_rows(tree, attend(tree, inputs), inputs)


def test_one_part_is_held_at_a_time(monkeypatch):
    """The next one takes its memory."""
    held = {"_forward": [], "_backward": []}

    def watched(kernel, sizes):
        def run(*args, **options):
            parts = kernel(*args, **options)
            sizes.append(sum(x.nbytes for x in parts))
            return parts

        return run

    for name, sizes in held.items():
        monkeypatch.setattr(cpu, name, watched(getattr(cpu, name), sizes))
    tree = tree_of_rows(prompt_and_responses(512, 256, 256))
    inputs = packed_inputs(tree, size=64)
    with TensorMemory() as forward:
        output = attend(tree, inputs)
    direction = torch.ones_like(output)
    with TensorMemory() as backward:
        grads = torch.autograd.grad(output, inputs, direction)
    kept = output.nbytes * 65 // 64, sum(x.nbytes for x in grads)  # log-sum-exp for each query
    for memory, sizes, result in zip((forward, backward), held.values(), kept, strict=True):
        assert len(sizes) > 4
        assert 0 < memory.peak - result < 1.5 * max(sizes)


def test_what_threads_would_wait_for_is_cut():
    """The longer side of what is seen whole, but few keys never; of a strip the queries."""
    prompt, responses = tiles.Tiles(0, 1025), tiles.Tiles(1025, 200)
    assert list(tiles._pieces(tiles.Call(responses, prompt), 2)) == [
        tiles.Call(tiles.Tiles(1025, 200, 2), tiles.Tiles(0, 512, 2, 512)),
        tiles.Call(responses, tiles.Tiles(1024, 1)),
    ]
    few, many = tiles.Tiles(0, 900), tiles.Tiles(1025, 1200)
    for queries, keys in [(responses, few), (many, prompt)]:
        half = queries.length // 2
        assert list(tiles._pieces(tiles.Call(queries, keys), 2)) == [
            tiles.Call(tiles.Tiles(1025, half, 2, half), keys._replace(number=2))
        ]
    strip = tiles.Call(tiles.Tiles(64, 65), tiles.Tiles(0, 129), causal=True)
    assert list(tiles._pieces(strip, 2)) == [
        tiles.Call(tiles.Tiles(64, 32, 2, 32), tiles.Tiles(0, 128, 2), causal=True),
        tiles.Call(tiles.Tiles(128, 1), tiles.Tiles(0, 129), causal=True),
    ]


def test_what_threads_would_not_wait_for_is_not_cut():
    """As many tiles as they need; fewer queries than the kernel takes at a time."""
    squares = tiles.Call(tiles.Tiles(256, 256, 2, 512), tiles.Tiles(0, 256, 2, 512))
    assert list(tiles._pieces(squares, 2)) == [squares]
    assert len(list(tiles._pieces(squares, 3))) == 4  # three of 85 queries and one, for each tile
    short = tiles.Call(tiles.Tiles(100, 63), tiles.Tiles(0, 100))
    assert list(tiles._pieces(short, 8)) == [short]


@pytest.mark.parametrize(
    ("key_heads", "threads", "number"),
    [(1, 1, 1), (8, 2, 1), (3, 2, 2), (9, 2, 1), (1, 2, 2), (2, 8, 4), (9, 8, 3), (5, 16, 3)],
)
def test_tiles_that_keep_the_threads_busy(key_heads, threads, number):
    """Nine key heads on two threads are five and four: good enough; three are two and one."""
    assert tiles.even_tiles(key_heads, threads) == number


def test_tiles_of_all_segments_are_cut_into_strips_together():
    """1,024 tokens are four tiles, two responses of 256 two more: four calls for all six, of which
    the first is square."""
    rows = [[*range(1024), *[2000 + r] * 256] for r in range(2)]
    assert [call for call in places_of(PrefixTree.from_rows(rows)) if call.causal] == [
        tiles.Call(tiles.Tiles(first, 64, 6, 256), tiles.Tiles(0, first + 64, 6, 256), causal=True)
        for first in (0, 64, 128, 192)
    ]


def test_the_last_strip_takes_what_is_left_over():
    strips = list(tiles._strips(tiles.Tiles(100, 150), 64))
    assert [strip.queries for strip in strips] == [tiles.Tiles(100, 64), tiles.Tiles(164, 86)]
    assert [strip.keys for strip in strips] == [tiles.Tiles(100, 64), tiles.Tiles(100, 150)]


def test_half_precision_is_halved_later_and_not_cut():
    tree = PrefixTree.from_rows([list(range(2500))])
    first, rest = tiles.Tiles(0, 1024, 2, 1024), tiles.Tiles(2048, 452)
    assert places_of(tree, torch.bfloat16) == [
        tiles.Call(first, first, causal=True),
        tiles.Call(rest, rest, causal=True),
        tiles.Call(tiles.Tiles(1024, 1024, 1, 2048), tiles.Tiles(0, 1024, 1, 2048)),
        tiles.Call(rest, tiles.Tiles(0, 2048)),
    ]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("heads", [(3, 1), (4, 2)])
def test_long_chains(monkeypatch, threads, heads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    start = list(range(700))
    rows = [start + list(range(1000, 1620)), start + list(range(2000, 2620))]
    tree = PrefixTree.from_rows(rows)
    inputs = packed_inputs(tree, *heads)
    assert_equals_duplicated_rows(tree, attend(tree, inputs), inputs)


def test_nested_branches():
    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7, 8, 9], [1, 2, 7, 8, 3], [5, 5, 5, 5, 5]]
    tree = PrefixTree.from_rows(rows)
    assert len({block[:2] for block in chain_blocks(tree)}) == 5
    assert_all_ways_equal(tree)
    assert_all_ways_equal(tree, sliding_window=3, softcap=2.0, sinks=True)


@pytest.mark.parametrize("window", [None, 3])
def test_heads_are_repeated_where_no_fused_kernel_takes_groups(monkeypatch, window):
    function, heads = torch.nn.functional.scaled_dot_product_attention, []

    def watched(q, k, v, **options):
        heads.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"]))
        return function(q, k, v, **options)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(sdpa, "served_on_cpu", lambda *inputs: False)
    tree = tree_of_rows([[1, 2, 3, 4], [1, 2, 5, 6]])
    for takes_groups, want in ((True, (4, 2, 2, True)), (False, (4, 4, 4, False))):
        heads.clear()
        monkeypatch.setattr(sdpa, "_takes_groups", lambda *call, answer=takes_groups: answer)
        assert_all_ways_equal(tree, sliding_window=window)
        assert set(heads) == {want}


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("efficient", [True, False])
def test_pytorch_is_asked_on_cuda(monkeypatch, flash, efficient):
    """With the tensors of the call itself: it knows GPUs, head sizes, and what the user allows."""

    class OnCuda:
        is_cuda = True

    q, k, v, mask = OnCuda(), object(), object(), object()
    asked = []
    monkeypatch.setattr(sdpa, "SDPAParams", lambda *params: params)
    for kernel, answer in (("flash", flash), ("efficient", efficient)):
        name = f"can_use_{kernel}_attention"
        monkeypatch.setattr(sdpa, name, lambda x, answer=answer: asked.append(x) or answer)
    assert sdpa._takes_groups(q, k, v, mask, 0.1, False) == (flash or efficient)
    assert asked == [(q, k, v, mask, 0.1, False, True)] * (1 if flash else 2)


def test_the_cpu_kernel_is_what_runs(monkeypatch):
    """Plain attention in one type and one head size; everything else goes chain by chain."""
    calls = []
    real = cpu.cpu_attention
    monkeypatch.setattr(sdpa, "cpu_attention", lambda *args: calls.append(1) or real(*args))
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    q, k, v = packed_inputs(tree)
    want = attend(tree, (q, k, v), sliding_window=100)
    assert not calls
    torch.testing.assert_close(attend(tree, (q, k, v)), want, atol=1e-12, rtol=1e-12)
    assert calls == [1]
    got = attend(tree, (q, k, v[..., :4]))
    torch.testing.assert_close(got, want[..., :4], atol=1e-12, rtol=1e-12)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_duplicated_rows(dtype):
    """Error of output and gradients to fp64 at most twice that of the fused kernel on rows."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 99, (60,), generator=generator).tolist()
    tree = PrefixTree.from_rows([[*start, 100 + r] + [200 + r] * 30 for r in range(6)])
    exact = packed_inputs(tree, size=16)
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    direction = torch.randn(1, tree.packed_tokens, 4, 16, generator=generator)
    q, k, v = (tree.unpack(x.transpose(1, 2)).transpose(1, 2) for x in inputs)
    rows = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    )
    outputs = {
        "truth": (duplicated_rows_attention(tree, *exact, scaling=0.3), exact),
        "shared": (attend(tree, inputs), inputs),
        "rows": (tree.pack(rows.transpose(1, 2)), inputs),
    }
    found = {}
    for name, (output, leaves) in outputs.items():
        grads = torch.autograd.grad(output, leaves, direction.to(output.dtype))
        found[name] = [x.double() for x in (output, *grads)]
    for truth, shared, on_rows in zip(*found.values(), strict=True):
        assert 0 < (shared - truth).norm() <= 2 * (on_rows - truth).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_are_rounded_once(dtype):
    """Backward computes in fp32, where the kernel is faster as well."""
    tree = PrefixTree.from_rows([[*range(90), *[100 + r] * 40] for r in range(2)])
    blocks = as_tensor(segment_blocks(tree))
    q, k, v = (x.detach().to(dtype) for x in packed_inputs(tree, size=16))
    output, lse = cpu.cpu_attention(q, k, v, blocks, 0.3)
    saved = (torch.randn_like(output), q, k, v, output)
    got = cpu.cpu_attention_backward(*saved, lse, blocks, 0.3)
    want = cpu.cpu_attention_backward(*(x.float() for x in saved), lse, blocks, 0.3)
    for ours, exact in zip(got, want, strict=True):
        assert torch.equal(ours, exact.to(dtype))


class Zeros(TorchDispatchMode):
    """Counts elements of tensors that are made of zeros, to be added to or written to in part."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        if func in (aten.slice_backward.default, aten.zeros.default, aten.new_zeros.default):
            self.elements += output.numel()
        return output


@pytest.mark.parametrize("options", [{"sliding_window": 40}, {"softcap": 2.0}])
@pytest.mark.parametrize("length", [8, 600])
def test_backward_fills_no_whole_tensor_for_each_chain(options, length):
    """Many chains, and many chunks of a long one under a window."""
    rows = [[*range(30 * r, 30 * r + 20), *[5000 + i] * length] for r in range(8) for i in range(2)]
    tree = tree_of_rows(rows)
    inputs = packed_inputs(tree, size=2)
    output = attend(tree, inputs, **options)
    with Zeros() as zeros:
        output.backward(torch.ones_like(output))
    keys_and_values, aligned_queries = 2 * inputs[1].numel(), 2 * inputs[0].numel()
    # Slices of the row, and under a window of each chain, in a group or two each.
    assert 0 < zeros.elements <= 5 * keys_and_values + aligned_queries


def test_gradients_of_slices_are_not_kept_until_all_are_there():
    """Eight chunks of 256 queries see 1,279 keys each: no more than a few times the keys."""
    tree = tree_of_rows([list(range(2048))])
    inputs = packed_inputs(tree, heads=4, kv_heads=4)
    output = attend(tree, inputs, sliding_window=1023)
    with TensorMemory() as memory:
        torch.autograd.grad(output, inputs, torch.ones_like(output))
    keys = inputs[1].numel() * inputs[1].element_size()
    assert memory.peak <= 8 * keys


def test_gradients_of_slices_are_added_in_fp32():
    x = torch.randn(1, 2, 6, 4).bfloat16().requires_grad_()
    pieces = sdpa._Slices.apply(x, [(0, 4), *[(1, 3)] * 50, (2, 6)])
    grads = [torch.randn(piece.shape).bfloat16() for piece in pieces]
    want = torch.zeros(1, 2, 6, 4)
    want[:, :, :4] += grads[0]
    want[:, :, 2:] += grads[-1]
    want[:, :, 1:3] += torch.stack(grads[1:-1]).float().sum(0)
    (got,) = torch.autograd.grad(pieces, x, grads)
    torch.testing.assert_close(got, want.bfloat16(), atol=0, rtol=2**-8)


def test_slices_in_other_kinds_of_differentiation():
    """Batched gradients, second derivatives, forward mode, and pieces of which some are unused."""
    tree = tree_of_rows([[1, 2, 3, 4, 5], [1, 2, 6, 7, 8], [1, 9, 9, 9, 9]])
    inputs = packed_inputs(tree)
    options = {"sliding_window": 3, "softcap": 2.0}

    def function(*inputs):
        return attend(tree, inputs, **options)[:, :-1]

    assert torch.autograd.gradcheck(
        function, inputs, check_batched_grad=True, check_forward_ad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("way", ["eager", "operator"])
def test_dropout_keeps_the_mean(softcap, way):
    """Attention weights are dropped at the given rate and scaled up: the mean stays."""
    tree = PrefixTree.from_rows([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]])
    inputs = [x.detach() for x in packed_inputs(tree)]
    plain = attend(tree, inputs, softcap=softcap)
    torch.manual_seed(0)
    blocks = sdpa.SDPA.plan(tree, None)["tree_blocks"]

    def draw():
        if way == "eager":
            return attend(tree, inputs, softcap=softcap, dropout=0.5)
        seed = torch.randint(2**62, (1,))
        return sdpa.chain_attention(*inputs, None, blocks, seed, 0.3, 0.5, None, softcap)

    times, tolerance = (4000, 0.12) if way == "eager" else (1500, 0.2)
    draws = [draw() for _ in range(times)]
    assert not torch.allclose(draws[0], draws[1])
    torch.testing.assert_close(torch.stack(draws).mean(0), plain, atol=tolerance, rtol=0)


def test_dropout_of_the_operator_is_the_same_in_backward():
    """`v` enters linearly: its gradient must be that of the very weights that were kept."""
    tree = PrefixTree.from_rows([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]])
    q, k, v = packed_inputs(tree)
    output = as_operator(tree, (q, k, v), dropout=0.5)
    (gradient,) = torch.autograd.grad(output, v, torch.ones_like(output))
    torch.testing.assert_close((gradient * v).sum(), output.sum())


def as_models_pass_them(x):
    """Heads split off the last dimension of a projection."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def strided(x):
    """Every second entry of a wider tensor."""
    return x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()


LAYOUTS = {
    "contiguous": lambda x: x,
    "as models pass them": as_models_pass_them,
    "strided": strided,
    "d-major": lambda x: x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    tree = PrefixTree.from_rows([[1, 2, 3, 4], [1, 2, 5, 6], [1, 7, 8, 9]])
    inputs = [LAYOUTS[layout](x) for x in packed_inputs(tree)]
    assert_equals_duplicated_rows(tree, attend(tree, inputs), inputs)
    for wanted in ([0], [1, 2], [2]):
        some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        got = attend(tree, some)
        want = duplicated_rows_attention(tree, *some, scaling=0.3)
        leaves = [some[i] for i in wanted]
        grads = (torch.autograd.grad(x.sin().sum(), leaves) for x in (got, want))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


class _Dropped(torch.autograd.Function):
    """A loss that takes an input and gives no gradient for it, as fused losses of a reference."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_output_that_is_not_differentiated():
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    inputs = packed_inputs(tree)
    blocks = as_tensor(segment_blocks(tree))
    output, _ = cpu.cpu_attention(*inputs, blocks, 0.3)
    _Dropped.apply(output).backward()
    assert all(x.grad is None for x in inputs)


def test_the_users_choice_of_kernel(monkeypatch):
    """`sdpa_kernel(MATH)` switches the flash kernel off: attention can be differentiated twice."""
    monkeypatch.setattr(sdpa, "cpu_attention", None)
    tree = PrefixTree.from_rows([[1, 2, 3, 4], [1, 2, 5, 6]])
    inputs = packed_inputs(tree)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda *x: attend(tree, x), inputs)


# What torch 2.14 looks at in the check, and means to hide.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", ["contiguous", "as models pass them", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_keep_pytorchs_rules(layout, dtype):
    """Schemas, shapes under fake tensors and registered gradients."""
    tree = PrefixTree.from_rows([[1, 2, 3, 4], [1, 2, 5, 6], [1, 7, 8, 9]])
    blocks, segments = (as_tensor(blocks(tree)) for blocks in (chain_blocks, segment_blocks))
    inputs = [x.detach().to(dtype).requires_grad_() for x in packed_inputs(tree)]
    inputs = [LAYOUTS[layout](x) for x in inputs]
    sinks = torch.randn(4, dtype=dtype, requires_grad=True)
    torch.library.opcheck(cpu.cpu_attention, (*inputs, segments, 0.3))
    for args in [(None, blocks, None, 0.3, 0.0, 2, None), (sinks, blocks, None, 0.3, 0.0, 2, 1.5)]:
        torch.library.opcheck(sdpa.chain_attention, (*inputs, *args))


@pytest.mark.parametrize("allowed", [True, False])
def test_cudnn_is_left_out(monkeypatch, allowed):
    """It would build a plan for every chain; what the user has allowed is so again afterwards."""
    function, seen = torch.nn.functional.scaled_dot_product_attention, []
    cuda = torch.backends.cuda

    def watched(*args, **kwargs):
        seen.append((cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled()))
        return function(*args, **kwargs)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", watched)
    tree = tree_of_rows([[1, 2, 3, 4], [1, 2, 5, 6]])
    kernels = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel([*kernels, SDPBackend.CUDNN_ATTENTION] if allowed else kernels):
        assert_all_ways_equal(tree, sliding_window=3)
        assert cuda.cudnn_sdp_enabled() == allowed
    assert set(seen) == {(False, True)}


def test_cudnn_stays_where_nothing_else_is_allowed():
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), sdpa._without_cudnn():
        assert torch.backends.cuda.cudnn_sdp_enabled()
