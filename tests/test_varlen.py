"""The calls that torch_varlen and flash make, run by an emulator of the documented semantics."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from batches import (
    LayerTokens,
    assert_equals_duplicated_rows,
    assert_same_run,
    packed_inputs,
    preference_batch,
    run,
)
from families import NO_SDPA, set_checkpointing, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tree import batches
from varlen_emulator import (
    flash_2,
    flash_with_sinks,
    install_flash,
    install_torch_varlen,
    serve,
)

from hf_prefix_patch import PrefixTree, enable_prefix_sharing, versions
from hf_prefix_patch.attention import prefix_sharing_attention
from hf_prefix_patch.backends import varlen
from hf_prefix_patch.backends.base import Needs, chain_blocks
from hf_prefix_patch.backends.sdpa import SDPA
from hf_prefix_patch.backends.varlen import FLASH, TORCH_VARLEN, gather_paths

NEEDS = Needs(
    device=torch.device("cpu"),
    dtype=torch.float64,
    implementation="flash_attention_2",
    head_dims=frozenset({8}),
    windows=frozenset({None}),
    features=frozenset(),
)


class FlashModule(torch.nn.Module):
    """An attention module as the flash backend sees it."""

    def __init__(self, weights=torch.float64, **config):
        super().__init__()
        if weights is not None:
            self.q_proj = torch.nn.Linear(2, 2)
            weight = torch.ones(2, 2, dtype=weights)
            self.q_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        original = SimpleNamespace(_attn_implementation="flash_attention_2", **config)
        self.config = SimpleNamespace(prefix_sharing_original=original, prefix_sharing_slides=None)


def attend(backend, tree, inputs, module=None, **options):
    windows = frozenset({None, options.get("sliding_window")})
    plan = backend.plan(tree, replace(NEEDS, windows=windows))
    return backend.attend(module or FlashModule(), *inputs, scaling=0.3, **options, **plan)


def assert_attends_alike(backend, tree, inputs, **options):
    got = attend(backend, tree, inputs[:3], **options)
    assert_equals_duplicated_rows(tree, got, inputs, **options)


# transformers before 4.56 lets flash attention see one key more than the window.
ONE_MORE = 0 if versions.release(transformers.__version__) >= (4, 56) else 1
whole_windows = pytest.mark.needs(transformers=">=4.56")

FIXTURE_IS_STATELESS = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(batch=batches(), window=st.sampled_from([None, 1, 2, 3, 5]))
@FIXTURE_IS_STATELESS
def test_torch_varlen_equals_duplicated_rows(monkeypatch, batch, window):
    """Output and gradients in fp64: grouped queries, windows, any tree."""
    calls = install_torch_varlen(monkeypatch)
    tree = PrefixTree.from_rows(*batch)
    assert_attends_alike(TORCH_VARLEN, tree, packed_inputs(tree), sliding_window=window)
    (call,) = calls
    assert call["window_size"] == (-1 if window is None else window - 1, 0)
    assert call["scale"] == 0.3
    assert call["return_aux"] is None


@given(
    batch=batches(), window=st.sampled_from([None, 1, 2, 5]), softcap=st.sampled_from([None, 1.5])
)
@FIXTURE_IS_STATELESS
def test_flash_equals_duplicated_rows(monkeypatch, batch, window, softcap):
    calls = install_flash(monkeypatch)
    tree = PrefixTree.from_rows(*batch)
    inputs = packed_inputs(tree)
    got = attend(FLASH, tree, inputs, sliding_window=window, softcap=softcap)
    seen = window and window + ONE_MORE
    assert_equals_duplicated_rows(tree, got, inputs, sliding_window=seen, softcap=softcap)
    (call,) = calls
    assert call["causal"] is True
    assert call["softmax_scale"] == 0.3
    assert call["dropout_p"] == 0.0


@pytest.mark.needs(transformers=">=4.55")  # the first with sinks
@given(batch=batches(), window=st.sampled_from([None, 2]))
@FIXTURE_IS_STATELESS
def test_flash_with_sinks_equals_duplicated_rows(monkeypatch, batch, window):
    """A kernel whose function has sinks; theirs is the fourth gradient."""
    install_flash(monkeypatch, flash_with_sinks)
    tree = PrefixTree.from_rows(*batch)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    inputs = [*packed_inputs(tree), sinks]
    assert_attends_alike(FLASH, tree, inputs, sliding_window=window, s_aux=sinks)


@pytest.mark.needs(transformers=">=4.55")
def test_sinks_are_of_the_type_of_the_queries(monkeypatch):
    calls = install_flash(monkeypatch, flash_with_sinks)
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    inputs = [x.detach().bfloat16() for x in packed_inputs(tree)]
    attend(FLASH, tree, inputs, s_aux=torch.zeros(4))
    assert calls[0]["s_aux"].dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [0, 1])
def test_no_gradient_is_summed_for_what_is_frozen(monkeypatch, frozen):
    """Keys of a first layer under an adapter on values, for one."""
    summed = []
    monkeypatch.setattr(varlen, "_sums", lambda grad, *path: summed.append(grad) or grad[:4])
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    inputs = [torch.randn(4, 1, 8, requires_grad=n != frozen) for n in range(2)]
    gathered = gather_paths(*inputs, *path_index(tree))
    sum(x.sum() for x in gathered).backward()
    assert len(summed) == 1
    assert inputs[frozen].grad is None


@pytest.mark.parametrize("backend", [TORCH_VARLEN, FLASH])
def test_narrow_value_heads(monkeypatch, backend):
    """Latent attention has smaller value heads; the kernels take one size."""
    install_torch_varlen(monkeypatch)
    install_flash(monkeypatch)
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    q, k, v = packed_inputs(tree)
    assert_attends_alike(backend, tree, [q, k, v.detach()[..., :4].requires_grad_()])


@pytest.mark.parametrize("backend", [TORCH_VARLEN, FLASH])
def test_chains_and_their_keys(monkeypatch, backend):
    """A prompt goes with its first response; other responses gather the prompt again."""
    install = install_torch_varlen if backend is TORCH_VARLEN else install_flash
    calls = install(monkeypatch)
    rows = [[1, 2, 3, 4], [1, 2, 5, 0], [7, 8, 0, 0]]
    tree = PrefixTree.from_rows(rows, [[int(token > 0) for token in row] for row in rows])
    attend(backend, tree, packed_inputs(tree))
    (call,) = calls
    cu = [x for name, x in call.items() if name.startswith("cu_seq")]
    assert [x.tolist() for x in cu] == [[0, 4, 5, 7], [0, 4, 7, 9]]
    assert [x for name, x in call.items() if name.startswith("max_")] == [4, 4]


@pytest.mark.parametrize("backend", [TORCH_VARLEN, FLASH])
def test_layers_with_a_window_gather_no_more_than_it_reaches(monkeypatch, backend):
    """With a window of 5 the first token of a response sees 4 before itself, and one more in flash
    attention of transformers before 4.56: 5 keys beside those of its own chain."""
    install = install_torch_varlen if backend is TORCH_VARLEN else install_flash
    calls = install(monkeypatch)
    prompt, rows = list(range(50)), []
    for first in (60, 70, 80):
        rows.append([*prompt, first, first + 1, first + 2])
    rows[1][25] = 99  # another prompt from there on, which has two responses
    rows.append([*rows[1][:50], 90, 91, 92])
    tree = PrefixTree.from_rows(rows)
    inputs = packed_inputs(tree)
    got = attend(backend, tree, inputs, sliding_window=5)
    seen = 5 + (ONE_MORE if backend is FLASH else 0)
    assert_equals_duplicated_rows(tree, got, inputs, sliding_window=seen)
    (call,) = calls
    queries, keys = (x.diff().tolist() for n, x in call.items() if n.startswith("cu_seq"))
    assert queries == [53, 3, 28, 3]
    assert keys == [53, 3 + 5, 28 + 5, 3 + 5]
    assert next(x for n, x in call.items() if n.startswith("max_") and n.endswith("k")) == 53


def test_a_window_that_was_not_planned_is_refused(monkeypatch):
    install_torch_varlen(monkeypatch)
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    plan = TORCH_VARLEN.plan(tree, NEEDS)
    message = r"passes the sliding window 3, but its config says \[None\]; pass backend=.sdpa"
    with pytest.raises(NotImplementedError, match=message):
        TORCH_VARLEN.attend(
            FlashModule(), *packed_inputs(tree), scaling=0.3, sliding_window=3, **plan
        )


def test_nothing_is_copied_where_nothing_is_shared(monkeypatch):
    """Packing alone: keys and values stand where they are."""
    calls = install_torch_varlen(monkeypatch)
    tree = PrefixTree.from_rows([[1, 2, 3], [4, 5, 0]], [[1, 1, 1], [1, 1, 0]])
    q, k, v = packed_inputs(tree)
    attend(TORCH_VARLEN, tree, (q, k, v))
    assert calls[0]["key"].data_ptr() == k.data_ptr()


@pytest.mark.parametrize(("deterministic", "asked"), [(True, True), (False, False)])
def test_flash_is_deterministic_where_torch_is(monkeypatch, deterministic, asked):
    calls = install_flash(monkeypatch)
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        output = attend(FLASH, tree, packed_inputs(tree), dropout=0.25)
        output.sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert calls[0]["deterministic"] is asked
    assert calls[0]["dropout_p"] == 0.25


@pytest.mark.parametrize("backend", [FLASH, SDPA])
@pytest.mark.parametrize(
    ("weights", "config", "autocast", "expected"),
    [
        (torch.bfloat16, {}, None, torch.bfloat16),
        (torch.float32, {}, None, torch.float32),
        (None, {}, None, torch.float32),
        (torch.float32, {}, torch.float16, torch.float16),
        (torch.bfloat16, {}, torch.float16, torch.float16),
        (torch.float32, dict.fromkeys(versions.QUANTIZED, torch.float16), None, torch.float16),
        (torch.float32, dict.fromkeys(versions.QUANTIZED, "float16"), None, torch.float16),
        (torch.uint8, dict.fromkeys(versions.QUANTIZED), None, torch.float32),
        (torch.float32, dict.fromkeys(versions.QUANTIZED, "float16"), *[torch.bfloat16] * 2),
    ],
)
def test_fp32_queries_are_cast_as_transformers_flash_attention_does(
    monkeypatch, backend, weights, config, autocast, expected
):
    """PEFT may keep norms, and so queries, in fp32; whichever backend serves such a model."""
    calls = install_flash(monkeypatch)
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    inputs = [x.detach().float() for x in packed_inputs(tree)]
    plan = {"tree_backend": backend, **backend.plan(tree, NEEDS)}
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        module = FlashModule(weights, **config)
        output, _ = prefix_sharing_attention(module, *inputs, None, **plan)
    assert output.dtype == expected
    for call in calls:
        assert call["q"].dtype == call["k"].dtype == call["v"].dtype == expected
    assert len(calls) == (backend is FLASH)


def test_torch_varlen_follows_autocast_and_refuses_fp32(monkeypatch):
    calls = install_torch_varlen(monkeypatch)
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    q, k, v = (x.detach().float() for x in packed_inputs(tree))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(TORCH_VARLEN, tree, (q, k, v.bfloat16())).dtype == torch.bfloat16
    assert len(calls) == 1
    with pytest.raises(NotImplementedError, match=r"in float32 outside autocast.*backend=\"sdpa\""):
        attend(TORCH_VARLEN, tree, (q, k, v))


@pytest.mark.parametrize("told", [True, False])
def test_flash_functions_that_are_not_there(monkeypatch, told):
    """Reasons against the backend, which a model's needs are then told by."""
    monkeypatch.setattr(versions, "FLASH_IS_RESOLVED", told)
    monkeypatch.setattr(
        varlen.hf_flash,
        "lazy_import_flash_attention",
        lambda name: ((None, None), None),
        raising=False,
    )
    with pytest.raises(ValueError, match="the kernel has none" if told else "it knows"):
        varlen._flash_varlen_function("flash_attention_9")


def path_index(tree):
    """`keys`, `places` and `starts` of `gather_paths`."""
    chains = TORCH_VARLEN.plan(tree, NEEDS)["tree_chains"][None]
    return chains["keys"], chains["places"], chains["starts"]


@given(batch=batches())
@settings(deadline=None)
def test_index_of_paths(batch):
    """Keys go down the path of each chain; places name those of a token, in order."""
    tree = PrefixTree.from_rows(*batch)
    blocks = chain_blocks(tree)
    want = [key for *_, start, stop in blocks for key in range(start, stop)]
    if len(want) == tree.packed_tokens:
        assert "keys" not in TORCH_VARLEN.plan(tree, NEEDS)["tree_chains"][None]
        return
    keys, places, starts = (x.tolist() for x in path_index(tree))
    assert keys == want
    stops = [*starts[1:], len(places)]
    for token, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        assert places[start:stop] == [i for i, key in enumerate(want) if key == token]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gathered_gradients_add_in_fp32(device):
    """A prompt of many responses: a sum of 64 bf16 gradients that rounds once."""
    tree = PrefixTree.from_rows([[1, 2, 3, 10 + r] for r in range(64)])
    shape, path = (tree.packed_tokens, 2, 8), [x.to(device) for x in path_index(tree)]
    x = torch.ones(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.rand(64 * 4, 2, 8, generator=generator).bfloat16() for _ in range(2)]
    for n, grad in enumerate(grads):
        (got,) = torch.autograd.grad(gather_paths(x, x, *path)[n], x, grad.to(device))
        # Of each key its token: the prompt's three, then the response's own.
        index = torch.tensor([[0, 1, 2, 3 + r] for r in range(64)]).flatten()
        want = torch.zeros(shape, dtype=torch.float64).index_add_(0, index, grad.double())
        digits = torch.finfo(torch.bfloat16).eps * 2 ** want.log2().floor()
        assert ((got.cpu() - want).abs() <= digits / 2).all()  # as near as bf16 comes


def test_gathered_gradients():
    tree = PrefixTree.from_rows([[1, 2, 3, 4], [1, 2, 5, 6]])
    k, v = (torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: gather_paths(*x, *path_index(tree)), (k, v))


@pytest.mark.parametrize("mode", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize(
    ("backend", "family", "function"),
    [
        (TORCH_VARLEN, "llama", None),
        (TORCH_VARLEN, "mistral-window", None),
        (TORCH_VARLEN, "gemma3", None),
        (FLASH, "qwen3", flash_2),
        pytest.param(FLASH, "qwen2-window", flash_2, marks=whole_windows),
        pytest.param(FLASH, "gemma2", flash_2, marks=whole_windows),
        (FLASH, "gpt-oss", flash_with_sinks),
    ],
)
def test_models_equal_the_unpatched_ones(monkeypatch, backend, family, function, mode):
    """Log-probs and gradients of whole models, each layer one call on the packed row."""
    calls = install_torch_varlen(monkeypatch)
    if function is not None:
        calls = install_flash(monkeypatch, function)
    serve(monkeypatch, backend)
    model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa")
    if backend is TORCH_VARLEN:  # which takes no fp32
        model.double()
    set_checkpointing(model, mode)
    batch = preference_batch()
    want = run(model, batch)
    if function is not None:
        # As loaded with it; set past the check that the package is installed.
        model.config._attn_implementation_internal = "flash_attention_2"
    sharing = enable_prefix_sharing(model, backend=backend.name, verify=False)
    seen = LayerTokens(model)
    assert_same_run(run(model, batch), want)
    assert sharing.backend == backend.name
    packed = sharing.stats.packed_tokens
    assert packed < batch.attention_mask.sum()
    assert set(seen.shapes) == {(1, packed)}
    assert len(calls) == (2 if mode == "none" else 4)
