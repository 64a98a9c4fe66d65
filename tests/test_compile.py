"""torch.compile: compiled layers and compiled models compute the same, in few graphs."""

import shutil
from dataclasses import replace

import pytest
import torch
from batches import assert_same_run, gradients, run
from families import NO_SDPA, tiny_model
from test_parity import random_batch
from torch._dynamo.testing import CompileCounterWithBackend
from varlen_emulator import serve, varlen_attention

from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.backends.varlen import TORCH_VARLEN
from hf_prefix_patch.planned import attach_plan
from hf_prefix_patch.plans import Plan

# The compiler raises warnings that it hides itself, and stops at them where they are errors.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def ragged_batches(count=12):
    """Batches of 1 to 7 rows in which something is shared or padded."""
    found, seed = [], 0
    while len(found) < count:
        batch, seed = random_batch(seed), seed + 1
        rows = [
            row[real.bool()].tolist()
            for row, real in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        if batch.attention_mask.all() and len({row[0] for row in rows}) == len(rows):
            continue
        found.append(batch)
    return found


def compile_layers(model):
    """Compile each layer on its own with graphs counted, through the autograd tracer."""
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.base_model.layers:
        layer.compile(backend=counter)
    return counter


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("llama", 1), ("mistral-window", 1), ("qwen2-window", 2), ("gemma2", 2)],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers(family, kinds, checkpointing):
    """12 ragged batches: at most 3 graphs for each kind of layer, no graph break, equal numbers."""
    model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = ragged_batches()
    want = [run(model, batch) for batch in batches]
    with enable_prefix_sharing(model, verify=False) as sharing:
        counter = compile_layers(model)
        for batch, expected in zip(batches, want, strict=True):
            assert_same_run(run(model, batch), expected, of_model=True)
    assert sharing.stats.calls == 12
    assert counter.frame_count <= 3 * kinds
    assert not torch._dynamo.utils.counters["graph_break"]


def test_sinks_add_no_graph_break():
    """gpt-oss's experts break the graph themselves; as often as without sharing."""
    batches = ragged_batches(1)
    breaks = []
    for share in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny_model("gpt-oss", "eager")
        want = [run(model, batch) for batch in batches]
        if share:
            enable_prefix_sharing(model, verify=False)
        compile_layers(model)
        for batch, expected in zip(batches, want, strict=True):
            assert_same_run(run(model, batch), expected, of_model=True)
        breaks.append(set(torch._dynamo.utils.counters["graph_break"]))
    assert breaks[1] <= breaks[0]


def test_dropout_in_compiled_layers_is_that_of_its_forward():
    """Gradients against finite differences of the same draw, in fp64."""
    model = tiny_model(attention_dropout=0.5).double()
    weight = model.model.layers[0].self_attn.v_proj.weight
    batch = ragged_batches(1)[0]
    direction = torch.randn(weight.shape, dtype=torch.float64)

    def loss(step=0.0, seed=0):
        torch.manual_seed(seed)
        with torch.no_grad():
            weight.add_(direction, alpha=step)
        logps, grads = run(model, batch)
        with torch.no_grad():
            weight.sub_(direction, alpha=step)
        weights = torch.linspace(1.0, -0.7, len(logps), dtype=logps.dtype)  # those of `run`
        return (logps * weights).sum().item(), grads["model.layers.0.self_attn.v_proj.weight"]

    with enable_prefix_sharing(model, verify=False) as sharing:
        compile_layers(model)
        assert loss(seed=1)[0] != loss(seed=2)[0]
        _, gradient = loss()
        slope = (loss(1e-3)[0] - loss(-1e-3)[0]) / 2e-3
    assert sharing.stats.calls == 5
    # As near as differences of log-probs in fp32 come.
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-3)


@torch.library.custom_op("hf_prefix_patch_tests::varlen", mutates_args=())
def emulated_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
) -> torch.Tensor:
    return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, left, 0).contiguous()


@emulated_varlen.register_fake
def _(q, *rest):
    return q.new_empty(q.shape)


@torch.library.custom_op("hf_prefix_patch_tests::varlen_backward", mutates_args=())
def emulated_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
) -> list[torch.Tensor]:
    def attend(q, k, v):
        return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, left, 0)

    return [x.contiguous() for x in torch.func.vjp(attend, q, k, v)[1](grad)]


@emulated_backward.register_fake
def _(grad, q, k, v, *rest):
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _differentiate(ctx, grad):
    return (*emulated_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 6)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


emulated_varlen.register_autograd(_differentiate, setup_context=_keep)


@pytest.mark.parametrize(("family", "kinds"), [("mistral-window", 1), ("qwen2-window", 2)])
def test_compiled_varlen(monkeypatch, family, kinds):
    """The calls of torch_varlen compile like those of sdpa; an opaque emulator is the kernel."""

    def varlen_attn(*args, scale, window_size, enable_gqa=False):
        return emulated_varlen(*args, scale, window_size[0])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    serve(monkeypatch, TORCH_VARLEN)
    model = tiny_model(family).double()
    batches = ragged_batches()
    want = [run(model, batch) for batch in batches]
    with enable_prefix_sharing(model, backend="torch_varlen", verify=False) as sharing:
        counter = compile_layers(model)
        for batch, expected in zip(batches, want, strict=True):
            assert_same_run(run(model, batch), expected, of_model=True)
    assert sharing.stats.calls == 12
    assert counter.frame_count <= 3 * kinds
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("enable_first", [False, True])
def test_compiled_model(enable_first):
    """Planning runs on the host between two graphs; all else compiles."""
    model = tiny_model()
    batches = ragged_batches(4)
    want = [run(model, batch) for batch in batches]
    compiled = torch.compile(model, backend="aot_eager")
    with enable_prefix_sharing(model if enable_first else compiled) as sharing:
        for batch, expected in zip(batches, want, strict=True):
            logps, _ = run(compiled, batch)
            assert_same_run((logps, gradients(model)), expected, of_model=True)
    assert sharing.stats.calls == 4
    logps, _ = run(compiled, batches[0])
    assert_same_run((logps, gradients(model)), want[0])


def test_compiled_model_with_planned_rows():
    """Rows that bring their plan cost a compiled model no graphs that plain ones do not."""
    batches = ragged_batches(3)
    counts = []
    for planned in (False, True):
        torch._dynamo.reset()
        model = tiny_model()
        want = [run(model, batch) for batch in batches]
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter)
        with enable_prefix_sharing(model, verify=False) as sharing:
            for batch, expected in zip(batches, want, strict=True):
                inputs = batch.inputs
                if planned:
                    inputs = attach_plan(Plan.of_rows(*inputs.values()), inputs)
                given = replace(batch, **inputs)
                logps, _ = run(compiled, given)
                assert_same_run((logps, gradients(model)), expected, of_model=True)
        assert sharing.stats.calls == 3
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("why", ["nothing to gain", "key/value cache"])
def test_compiled_model_with_planned_rows_that_runs_unshared(why):
    """Compiled code takes no tensors of another class, so a bypassed call gets plain ones."""
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8], [9 if why == "nothing to gain" else 5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    planned = attach_plan(Plan.of_rows(*inputs.values()), inputs)
    options = {"labels": ids, "use_cache": why != "nothing to gain"}
    model(**inputs, **options).loss.backward()
    want = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    with enable_prefix_sharing(model, verify=False, on_bypass="ignore") as sharing:
        compiled(**planned, **options).loss.backward()
    assert sharing.stats.bypassed == {why: 1}
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name])


def test_compiled_by_inductor():
    """The default compiler, whose C++ the machine may not be able to build."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler for torch.compile")
    from torch._inductor.utils import fresh_cache

    model = tiny_model()
    batches = ragged_batches(3)
    want = [run(model, batch) for batch in batches]
    # Its cache on disk knows nothing of how an operator of ours lays out what it returns.
    with fresh_cache(), enable_prefix_sharing(model, verify=False) as sharing:
        for layer in model.model.layers:
            layer.compile()
        for batch, expected in zip(batches, want, strict=True):
            assert_same_run(run(model, batch), expected, of_model=True)
    assert sharing.stats.calls == 3
