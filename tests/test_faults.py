"""Exceptions in the middle of things: the model stays usable, shared as before, and unpatchable."""

import linecache
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from batches import assert_same_run, preference_batch, run
from composites import tiny_composite
from families import set_checkpointing, tiny_model
from test_patch import footprint
from tiny_trl import build_trainer, load, save_tiny_model
from torch._dynamo import eval_frame

from hf_prefix_patch import (
    PrefixTree,
    attach,
    attention,
    completion_logps,
    disable_prefix_sharing,
    enable_prefix_sharing,
    hooks,
    patch,
    plans,
    verify,
)
from hf_prefix_patch.composite import decoder_of
from hf_prefix_patch.wrappers import backbone_of

ERRORS = (torch.OutOfMemoryError, KeyboardInterrupt)


def layer(index):
    def fault(model, fail, monkeypatch):
        layers = decoder_of(backbone_of(model)).layers
        layers[index].register_forward_hook(fail)

    return fault


def inside(owner, name):
    """A function of the package that fails where it would return."""

    def fault(model, fail, monkeypatch):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            function(*args, **kwargs)
            fail()

        monkeypatch.setattr(owner, name, call)

    return fault


def head(model, fail, monkeypatch):
    model.get_output_embeddings().register_forward_pre_hook(fail)


def backward(model, fail, monkeypatch):
    layers = decoder_of(backbone_of(model)).layers
    layers[0].register_full_backward_hook(fail)


def recomputation(model, fail, monkeypatch):
    """The second forward of a layer, in backward, if it is checkpointed."""
    calls = []
    layers = decoder_of(backbone_of(model)).layers
    inner = next(layers[0].children())
    inner.register_forward_hook(lambda *_: calls.append(1) or (fail() if len(calls) == 2 else None))


FAULTS = {
    "planning": inside(plans, "host_rows"),
    "packing": inside(PrefixTree, "pack"),
    "first layer": layer(0),
    "attention": inside(attention, "_check_call"),
    "last layer": layer(-1),
    "unpacking": inside(PrefixTree, "unpack"),
    "head": head,
    "backward": backward,
    "recomputation": recomputation,
}
MODELS = {
    "llama": (tiny_model, "llama", "none"),
    "llama, checkpointed": (tiny_model, "llama", "non-reentrant"),
    "llama, reentrant": (tiny_model, "llama", "reentrant"),
    "gemma2, checkpointed": (tiny_model, "gemma2", "non-reentrant"),
    "mixtral": (tiny_model, "mixtral", "none"),
    "qwen3.5": (tiny_model, "qwen3.5", "none"),
    "qwen3.5, checkpointed": (tiny_model, "qwen3.5", "non-reentrant"),
    "llava": (tiny_composite, "llava", "none"),
    "qwen2.5-vl, checkpointed": (tiny_composite, "qwen2.5-vl", "non-reentrant"),
}


def snapshot(model):
    """All that a call or a verification could leave behind."""
    hooks = [(len(m._backward_hooks), m.training) for m in model.modules()]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return footprint(model), hooks, modes, torch.get_rng_state().tolist()


def assert_equal_runs(got, want):
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], x) for name, x in want[1].items())


@pytest.mark.parametrize("family", MODELS)
def test_a_call_that_fails_leaves_nothing(family, monkeypatch):
    """Wherever it fails: the next call is shared, and gives to the bit what it gave before."""
    make, name, checkpointing = MODELS[family]
    model, batch = make(name), preference_batch()
    set_checkpointing(model, checkpointing)
    run(model, batch, output_hidden_states=True)  # transformers installs hooks of its own
    unpatched, before = run(model, batch), snapshot(model)
    sharing = enable_prefix_sharing(model)
    want, patched = run(model, batch), snapshot(model)
    if not name.startswith("qwen3.5"):  # which in fp32 differs from itself when rows move
        assert_same_run(want, unpatched, of_model=True)
    faults = [place for place in FAULTS if place != "recomputation" or checkpointing != "none"]
    for place, error in zip(faults, cycle(ERRORS), strict=False):
        plans.forget()

        def fail(*_, place=place, error=error):
            raise error(place)

        with monkeypatch.context() as undo:
            for module in model.modules():
                for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                    undo.setattr(module, kind, vars(module)[kind].copy())
            FAULTS[place](model, fail, undo)
            with pytest.raises(error, match=place):
                run(model, batch)
        assert snapshot(model) == patched, place
        calls = sharing.stats.calls
        assert_equal_runs(run(model, batch), want)
        assert sharing.stats.calls == calls + 1
    assert not sharing.stats.bypassed
    sharing.remove()
    assert snapshot(model) == before
    assert_equal_runs(run(model, batch), unpatched)


def interrupt(call, line, files):
    """Ctrl-C before the `line`-th line of these files that the call comes to, each line counted
    once; where that was, or None if there are not so many."""
    seen, places, before = set(), iter(range(line)), sys.gettrace()

    def trace(frame, event, arg):
        place = frame.f_code.co_filename, frame.f_lineno
        if place[0] not in files:
            return None
        if event == "line" and place not in seen:
            seen.add(place)
            if next(places, None) is None:
                sys.settrace(before)
                raise KeyboardInterrupt(f"{place[0]}:{place[1]}")
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt as stop:
        return str(stop)
    finally:
        sys.settrace(before)
    return None


def files_of(*modules):
    return {module.__file__ for module in modules}


@pytest.mark.parametrize(("make", "step"), [(tiny_model, 1), (tiny_composite, 7)])
def test_ctrl_c_anywhere_while_enabling(make, step):
    """The model is as it was, or enabled whole when the handle was all that was still to come."""
    model, batch = make(), preference_batch()
    list(model.modules())[-1].eval()  # flags differ
    run(model, batch, output_hidden_states=True)
    enable_prefix_sharing(model).remove()
    before = snapshot(model)
    files, line = files_of(patch, attach, hooks, verify), 0
    while place := interrupt(lambda: enable_prefix_sharing(model), line, files):
        line += step
        file, _, number = place.rpartition(":")
        if linecache.getline(file, int(number)).strip() == "return handle":
            disable_prefix_sharing(model)
        assert snapshot(model) == before, f"{Path(file).name}:{number}"
        assert eval_frame._stance.stance == "default", f"{Path(file).name}:{number}"
    assert line > 150
    disable_prefix_sharing(model)
    assert snapshot(model) == before


def test_ctrl_c_anywhere_while_removing():
    """Removing again does the rest."""
    model, batch = tiny_model(), preference_batch()
    want = run(model, batch, output_hidden_states=True)
    before, line = snapshot(model), 0
    files = files_of(patch, hooks)
    while interrupt(enable_prefix_sharing(model, verify=False).remove, line, files):
        line += 1
        disable_prefix_sharing(model)
        assert snapshot(model) == before
    assert line > 10
    assert_equal_runs(run(model, batch, output_hidden_states=True), want)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_verification_that_cannot_end(monkeypatch, error, call):
    """It says what stopped it, not that the model was found wrong."""
    model = tiny_model()
    before, calls = snapshot(model), []

    def fail(*_):
        calls.append(1)
        if len(calls) == call:
            raise error("not now")

    with monkeypatch.context() as undo:
        undo.setattr(model.model.layers[1].mlp, "forward", fail_first(model, fail))
        with pytest.raises(error, match="not now"):
            enable_prefix_sharing(model)
    assert len(calls) == call
    assert snapshot(model) == before
    enable_prefix_sharing(model).remove()


def fail_first(model, fail):
    forward = model.model.layers[1].mlp.forward
    return lambda x: fail() or forward(x)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["last layer", "head"])
def test_log_probs_that_fail(monkeypatch, error, place):
    """No hook of `completion_logps` stays behind."""
    model, batch = tiny_model(), preference_batch()
    inputs = {**batch.inputs, "completion_mask": batch.completion}
    sharing = enable_prefix_sharing(model)
    want, before = completion_logps(model, inputs), snapshot(model)

    def fail(*_):
        raise error(place)

    with monkeypatch.context() as undo:
        target = model.model.layers[1].mlp if place == "last layer" else model.lm_head
        undo.setattr(target, "forward", fail)
        with pytest.raises(error, match=place):
            completion_logps(model, inputs)
    assert snapshot(model) == before
    assert torch.equal(completion_logps(model, inputs), want)
    assert sharing.stats.calls == 3


def test_ctrl_c_anywhere_in_a_shared_call():
    """In the hooks too, planning and counting included."""
    model, batch = tiny_model(), preference_batch()
    sharing = enable_prefix_sharing(model)
    want, before = run(model, batch), snapshot(model)
    files = {str(file) for file in Path(patch.__file__).parent.rglob("*.py")}
    lines = 0

    def call():
        plans.forget()
        model(**batch.inputs)

    while interrupt(call, lines, files):
        lines += 1
        assert snapshot(model) == before
    assert lines > 200
    calls = sharing.stats.calls
    assert_equal_runs(run(model, batch), want)
    assert sharing.stats.calls == calls + 1
    assert sharing.stats.row_tokens == sharing.stats.calls * int(batch.attention_mask.sum())


@pytest.mark.needs(trl=">=0.29")  # which deals out batches by token budget
@pytest.mark.parametrize("error", ERRORS)
def test_a_trainer_that_is_patched_halfway(tmp_path, monkeypatch, error):
    """Nothing of it stays, in the trainer or in its model."""
    trainer = build_trainer(load(save_tiny_model(tmp_path)), tmp_path, lora=True)
    trainer._set_signature_columns_if_needed()  # which it keeps once it was asked
    before, whole = dict(vars(trainer)), snapshot(trainer.model)
    callbacks = list(trainer.callback_handler.callbacks)

    def fail(_):
        raise error("halfway")

    monkeypatch.setattr(type(trainer), "add_callback", lambda self, callback: fail(callback))
    with pytest.raises(error, match="halfway"):
        enable_prefix_sharing(trainer, max_tokens_per_batch=512)
    assert vars(trainer) == before
    assert trainer.callback_handler.callbacks == callbacks
    assert snapshot(trainer.model) == whole
    monkeypatch.undo()
    enable_prefix_sharing(trainer, max_tokens_per_batch=512).remove()
    assert vars(trainer) == before
    assert trainer.callback_handler.callbacks == callbacks
