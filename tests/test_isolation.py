"""Models side by side: in one process, in threads, in other processes."""

import copy
import io
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from batches import (
    LayerTokens,
    assert_same_run,
    completion_logps,
    gradients,
    logits_of,
    preference_batch,
    run,
)
from composites import tiny_composite
from families import tiny_model
from precision import TOLERANCE, in_doubles
from test_patch import footprint
from transformers import LlamaForSequenceClassification

from hf_prefix_patch import PrefixTree, SharingStats, enable_prefix_sharing
from hf_prefix_patch.hooks import patch_of

WEIGHTS = torch.linspace(1.0, -0.7, 4)


def scaled(model, factor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def same_class():
    return tiny_model(), scaled(tiny_model(), 1.2)


def other_class():
    return tiny_model("mistral-window"), tiny_model("gemma2")


def one_config():
    model = tiny_model()
    return model, scaled(type(model)(model.config).train(), 1.2)


def hybrids():
    """In doubles: in fp32 one differs from itself when its rows move."""
    return tiny_model("qwen3.5"), scaled(tiny_model("qwen3.5"), 0.9)


def accurate(make, monkeypatch):
    """The models, and what they may differ by."""
    if make is not hybrids:
        return make(), 2e-5
    return [in_doubles(model, monkeypatch) for model in make()], TOLERANCE


def composite_and_text():
    return tiny_composite("llava"), tiny_model()


def common_layer():
    """A module of one is a module of the other."""
    model, other = tiny_model(), scaled(tiny_model(), 1.2)
    other.model.layers[0] = model.model.layers[0]
    return model, other


@pytest.mark.parametrize(
    "make", [same_class, other_class, one_config, hybrids, composite_and_text, common_layer]
)
@pytest.mark.parametrize("first", [0, 1])
def test_interleaved(make, first, monkeypatch):
    """Two forwards, two backwards crosswise, one model unpatched in between, and either first."""
    models, tolerance = accurate(make, monkeypatch)
    batches = preference_batch(), preference_batch(seed=3)
    if make is not hybrids:  # checkpointed layers run again when the other model has been called
        models[0].gradient_checkpointing_enable({"use_reentrant": False})
        models[0].enable_input_require_grads()

    def interleaved():
        for model in models:
            model.zero_grad(set_to_none=True)
        logps = [
            completion_logps(model(**batch.inputs).logits, batch)
            for model, batch in zip(models, batches, strict=True)
        ]
        for x in logps:
            (x * WEIGHTS.to(x.dtype)).sum().backward()
        return [(x.detach(), gradients(model)) for x, model in zip(logps, models, strict=True)]

    want = interleaved()
    before = [footprint(model) for model in models]
    handles = [enable_prefix_sharing(model, verify=False) for model in models]
    seen = [LayerTokens(model) for model in models]
    for got, wanted in zip(interleaved(), want, strict=True):
        assert_same_run(got, wanted, of_model=True, tolerance=tolerance)
    if make is not common_layer:
        assert all(shape[0] == 1 for tokens in seen for shape in tokens.shapes)
    assert [handle.stats.calls for handle in handles] == [1, 1]
    handles[first].remove()
    for got, wanted in zip(interleaved(), want, strict=True):
        assert_same_run(got, wanted, of_model=True, tolerance=tolerance)
    assert handles[first].stats.calls == 1
    assert handles[1 - first].stats.calls == 2
    handles[1 - first].remove()
    for got, wanted in zip(interleaved(), want, strict=True):
        assert torch.equal(got[0], wanted[0])
    for model, whole in zip(models, before, strict=True):
        left = footprint(model)
        assert left["configs"] == whole["configs"]
        assert left["attributes"] == whole["attributes"]


def test_two_heads_on_one_stack():
    """A policy and a critic: the stack is patched once, whichever head it is called by."""
    policy, batch = tiny_model(), preference_batch()
    policy.config.num_labels = 1
    critic = LlamaForSequenceClassification(policy.config).train()
    critic.model = policy.model
    want = run(policy, batch), critic(**batch.inputs).logits
    with enable_prefix_sharing(policy) as sharing:
        with enable_prefix_sharing(critic) as again:
            torch.testing.assert_close(critic(**batch.inputs).logits, want[1])
            assert again.stats is sharing.stats
        assert_same_run(run(policy, batch), want[0])
    assert sharing.stats.calls == 2
    assert patch_of(policy.model) is None


def test_nested_contexts():
    """The inner one brings back what it found; the model is shared until the outer one ends."""
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model, backend="sdpa", on_bypass="raise") as outer:
        with enable_prefix_sharing(model, on_bypass="ignore") as inner:
            run(model, batch)
            run(model, batch, output_attentions=True)
        assert patch_of(model.model) is not None
        with pytest.raises(RuntimeError, match="output_attentions"):
            run(model, batch, output_attentions=True)
        assert "backend='sdpa'" in repr(outer)
        run(model, batch)
        assert inner.stats.calls == outer.stats.calls == 2
    assert patch_of(model.model) is None
    with enable_prefix_sharing(model) as outer:
        with enable_prefix_sharing(model) as inner:
            inner.remove()  # whoever asks for it
        assert patch_of(model.model) is None
        with enable_prefix_sharing(model):
            outer.remove()
            assert patch_of(model.model) is not None  # another patch than its own
    assert "removed" in repr(outer)


@pytest.fixture
def restless(monkeypatch):
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("make", [same_class, other_class, hybrids])
def test_threads_with_models_of_their_own(make, restless, monkeypatch):
    """Forward and backward of both at once."""
    models, tolerance = accurate(make, monkeypatch)
    batches = [[preference_batch(seed=i + 10 * j) for i in range(3)] for j in range(2)]
    wants = [[run(m, b) for b in bs] for m, bs in zip(models, batches, strict=True)]
    handles = [enable_prefix_sharing(model, verify=False) for model in models]

    def work(j):
        return [(i, run(models[j], batches[j][i])) for i in [0, 1, 2] * 4]

    with ThreadPoolExecutor(2) as pool:
        for j, results in enumerate(pool.map(work, range(2))):
            for i, got in results:
                assert_same_run(got, wants[j][i], of_model=True, tolerance=tolerance)
    assert [(x.stats.calls, x.stats.bypassed.total()) for x in handles] == [(12, 0), (12, 0)]


def test_inference_in_one_thread_and_training_in_another(restless):
    """One model, one plan at a time remembered, and gradients none of which is the other's."""
    model, batch, other = tiny_model(), preference_batch(), preference_batch(seed=3)
    want, real = run(model, batch), other.attention_mask.bool()
    known, done = logits_of(model, other), Event()
    sharing = enable_prefix_sharing(model)

    def infer():
        calls = 0
        while not done.is_set() or not calls:
            got = logits_of(model, other)
            torch.testing.assert_close(got[real], known[real], atol=1e-5, rtol=1e-4)
            calls += 1
        return calls

    with ThreadPoolExecutor(1) as pool:
        inferred = pool.submit(infer)
        try:
            for _ in range(10):
                assert_same_run(run(model, batch), want)
        finally:
            done.set()
    # Read after the pool has joined: the thread's last call counts before it is in its result.
    assert sharing.stats.calls == 10 + inferred.result()


def test_counts_of_threads_add_up(monkeypatch):
    """Where every thread waits in the middle of counting."""
    tree, stats = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]]), SharingStats()
    monkeypatch.setattr(PrefixTree, "packed_tokens", property(lambda _: time.sleep(1e-3) or 4))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: stats.add(tree), range(20)))
    assert (stats.calls, stats.row_tokens, stats.packed_tokens) == (20, 120, 80)


@pytest.mark.parametrize("family", ["llama", "qwen3.5"])
def test_a_saved_model(family):
    """`torch.save` of the whole model, while it is patched."""
    model, batch = tiny_model(family), preference_batch()
    file = io.BytesIO()
    with enable_prefix_sharing(model):
        want = run(model, batch)
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    got = run(loaded, batch)
    assert torch.equal(got[0], want[0])
    assert patch_of(loaded.model).stats.calls == 2  # as they were, and one more
    assert patch_of(model.model) is None


def run_in_worker(model, batch, results):
    torch.set_num_threads(1)
    seen = LayerTokens(model)
    logps, grads = run(model, batch)
    head = grads["lm_head.weight"]
    results.put((logps.tolist(), head.tolist(), seen.shapes))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # that is what is tested
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers(method):
    """A patched model sent to a new process, and one that a forked process finds."""
    model, batch = tiny_model(), preference_batch()
    sharing = enable_prefix_sharing(model)
    want, grads = run(model, batch)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    worker = context.Process(target=run_in_worker, args=(copy.deepcopy(model), batch, results))
    worker.start()
    logps, head, shapes = results.get(timeout=300)
    worker.join(60)
    assert worker.exitcode == 0
    torch.testing.assert_close(torch.tensor(logps), want)
    torch.testing.assert_close(torch.tensor(head), grads["lm_head.weight"])
    assert shapes == [(1, sharing.stats.packed_tokens)]
    assert sharing.stats.calls == 1
