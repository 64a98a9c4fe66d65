"""Enabling and disabling: what changes, and that nothing is left."""

import copy
import gc
import logging
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

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
from families import FAMILIES, NO_SDPA, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixTree,
    SharingStats,
    attach,
    disable_prefix_sharing,
    enable_prefix_sharing,
    hooks,
    plans,
)
from hf_prefix_patch.outputs import unpack_output


def footprint(model):
    """Everything that a patch may touch."""
    return {
        "hooks": [
            (
                name,
                len(m._forward_pre_hooks),
                len(m._forward_hooks),
                len(m._forward_hooks_with_kwargs),
            )
            for name, m in model.named_modules()
        ],
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "configs": {
            name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")
        },
        "state": list(model.state_dict()),
        "config": model.config.to_dict(),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_is_on_the_decoder_stack(family):
    """Some trainers call the stack and not the model; Gemma 3 of transformers before 5 names its
    stack by a prefix that leads nowhere."""
    model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa")
    enable_prefix_sharing(model, verify=False)
    assert hooks.patch_of(model.model) is not None
    assert hooks.patch_of(model) is None


@pytest.mark.parametrize("how", ["handle", "with", "disable"])
def test_four_beats(how):
    """Unpatched, patched, undone: bit-equal again and nothing left, then patched once more."""
    model, batch = tiny_model(), preference_batch()
    model(**batch.inputs, output_hidden_states=True)  # transformers installs hooks of its own
    before, want = footprint(model), logits_of(model, batch)
    if how == "with":
        with enable_prefix_sharing(model) as sharing:
            logits_of(model, batch)
    else:
        sharing = enable_prefix_sharing(model)
        logits_of(model, batch)
        sharing.remove() if how == "handle" else disable_prefix_sharing(model)
    assert sharing.stats.calls == 1
    assert torch.equal(logits_of(model, batch), want)
    assert sharing.stats.calls == 1
    assert footprint(model) == before
    with enable_prefix_sharing(model) as again:
        logits_of(model, batch)
    assert again.stats.calls == 1


def test_the_model_keeps_its_config_while_patched():
    model = tiny_model()
    config, keys = model.config.to_dict(), list(model.state_dict())
    with enable_prefix_sharing(model):
        assert model.config.to_dict() == config
        assert model.config._attn_implementation == "sdpa"
        assert list(model.state_dict()) == keys


def test_enabling_again_in_vain_changes_nothing(monkeypatch):
    model = tiny_model()
    enable_prefix_sharing(model)
    patch = model.model._prefix_sharing
    before = patch.backend, patch.on_bypass, patch.cache_by_default
    last = patch.last

    def fail(*args):
        raise RuntimeError("not today")

    monkeypatch.setattr(attach, "verify_sharing", fail)
    with pytest.raises(RuntimeError, match="not today"):
        enable_prefix_sharing(model, backend="sdpa", on_bypass="ignore")
    assert (patch.backend, patch.on_bypass, patch.cache_by_default) == before
    assert patch.last is last  # what the handle tells of


def test_enabling_twice_is_enabling_once():
    model, batch = tiny_model(), preference_batch()
    first = enable_prefix_sharing(model)
    before = footprint(model)
    second = enable_prefix_sharing(model, on_bypass="ignore")
    assert footprint(model) == before
    logits_of(model, batch)
    assert first.stats is second.stats
    assert first.stats.calls == 1
    second.remove()
    first.remove()
    disable_prefix_sharing(model)
    assert not model.model._forward_pre_hooks


def test_an_old_handle_does_not_remove_a_newer_patch():
    model, batch = tiny_model(), preference_batch()
    old = enable_prefix_sharing(model)
    old.remove()
    with enable_prefix_sharing(model) as new:
        old.remove()
        logits_of(model, batch)
    assert new.stats.calls == 1
    assert "removed" in repr(new)


def test_a_handle_keeps_no_model_alive():
    """`sharing.stats` is read after training, when the model may be gone."""
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model) as removed:
        logits_of(model, batch)
    active = enable_prefix_sharing(model)
    parts = model.model, model.model.layers[0], model.model.layers[0].self_attn.q_proj.weight
    alive = [weakref.ref(part) for part in parts]
    del model, parts
    gc.collect()
    assert [part() for part in alive] == [None] * 3
    assert removed.stats.calls == 1
    for handle in (removed, active):
        assert handle.backbones == []
        assert handle.backend == "sdpa"
        assert "removed" in repr(handle)
        handle.remove()


def test_warnings_point_at_the_call():
    """Each place of the program has its own, though the message is one."""
    models, batch = [tiny_model(), tiny_model()], preference_batch()
    for model in models:
        enable_prefix_sharing(model, verify=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        models[0].train()(**batch.inputs, output_attentions=True)
        models[1].train()(**batch.inputs, output_attentions=True)
    said = [warning for warning in said if "prefix sharing" in str(warning.message)]
    assert [warning.filename for warning in said] == [__file__, __file__]
    assert said[1].lineno == said[0].lineno + 1


def test_an_exception_in_forward_leaves_the_model_usable():
    model, batch = tiny_model(), preference_batch()
    want = logits_of(model, batch)

    def fail(*_):
        raise MemoryError("out of memory")

    with enable_prefix_sharing(model):
        failing = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            logits_of(model, batch)
        failing.remove()
        real = batch.attention_mask.bool()
        got = logits_of(model, batch)
        torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-4)
    assert torch.equal(logits_of(model, batch), want)


def test_a_deep_copy_runs_its_own_weights():
    model, batch = tiny_model(), preference_batch()
    sharing = enable_prefix_sharing(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.3)
    got = run(copied, batch)
    assert sharing.stats.calls == 0
    assert copied.model._prefix_sharing.stats.calls == 1
    disable_prefix_sharing(copied)
    assert_same_run(got, run(copied, batch))
    assert not copied.model._forward_pre_hooks
    logits_of(model, batch)
    assert sharing.stats.calls == 1


def test_pickle():
    model, batch = tiny_model(), preference_batch()
    enable_prefix_sharing(model)
    loaded = pickle.loads(pickle.dumps(model))
    seen = LayerTokens(loaded)
    got = run(loaded, batch)
    assert seen.shapes[0][0] == 1
    disable_prefix_sharing(loaded)
    assert_same_run(got, run(loaded, batch))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_is_bit_equal(attention):
    model = tiny_model(attention=attention).eval()
    batch = preference_batch("left")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    want = model.generate(**batch.inputs, **options, return_dict_in_generate=True)
    with enable_prefix_sharing(model) as sharing:
        got = model.generate(**batch.inputs, **options, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want.sequences)
    assert all(map(torch.equal, got.logits, want.logits))
    assert set(sharing.stats.bypassed) == {"key/value cache"}


def test_save_pretrained(tmp_path):
    """A patched model saves what an unpatched one saves."""
    model, batch = tiny_model(), preference_batch()
    model.save_pretrained(tmp_path / "plain")
    with enable_prefix_sharing(model):
        model.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "patched" / name
        ).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_a_model_built_from_the_config_is_unpatched():
    model = tiny_model()
    with enable_prefix_sharing(model):
        other = type(model)(model.config)
    assert other.model.layers[0].self_attn.config is other.config
    assert not other.model._forward_pre_hooks


def test_reference_forward_between_forward_and_backward():
    """Interleaved calls keep their own plans, checkpointed layers included."""
    model, batch, other = tiny_model(), preference_batch(), preference_batch(seed=5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()

    def interleaved():
        model.zero_grad()
        loss = model(**batch.inputs).logits[batch.completion.bool()].logsumexp(-1).sum()
        logits_of(model, other)
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = interleaved()
    with enable_prefix_sharing(model) as sharing:
        got = interleaved()
    assert sharing.stats.calls == 2
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_stacked_hidden_states_come_back_as_rows():
    """Gemma 3n stacks several hidden states ahead of the batch."""
    tree = PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]])
    packed = torch.randn(5, 1, tree.packed_tokens, 8)
    rows = unpack_output(tree, packed)
    assert rows.shape == (5, 2, 3, 8)
    assert torch.equal(rows[3], tree.unpack(packed[3]))


def test_two_models_do_not_touch_each_other():
    model, other, batch = tiny_model(), tiny_model("qwen3"), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        want = logits_of(other, batch)
        with enable_prefix_sharing(other) as other_sharing:
            logits_of(other, batch)
            logits_of(model, batch)
        assert torch.equal(logits_of(other, batch), want)
        logits_of(model, batch)
    assert (sharing.stats.calls, other_sharing.stats.calls) == (2, 1)


def test_a_plan_made_in_inference_mode_serves_training():
    model, batch = tiny_model(), preference_batch()
    want = run(model, batch)
    with enable_prefix_sharing(model) as sharing:
        with torch.inference_mode():
            logits_of(model, preference_batch())
        got = run(model, batch)
    assert_same_run(got, want)
    assert sharing.stats.calls == 2


def test_threads():
    """Two models at once, each with batches of its own: no plan goes to the wrong one."""
    models = [tiny_model(), tiny_model("qwen3")]
    batches = [[preference_batch(seed=i + 10 * j) for i in range(6)] for j in range(2)]
    wants = [[logits_of(m, b) for b in bs] for m, bs in zip(models, batches, strict=True)]

    def work(j):
        for i in list(range(6)) * 5:
            got, real = logits_of(models[j], batches[j][i]), batches[j][i].attention_mask.bool()
            torch.testing.assert_close(got[real], wants[j][i][real], atol=1e-5, rtol=1e-4)

    handles = [enable_prefix_sharing(model) for model in models]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert [handle.stats.calls for handle in handles] == [30, 30]


def test_the_plan_is_remembered_for_equal_rows_only(monkeypatch):
    grown = []
    original = plans.Plan.of_rows
    monkeypatch.setattr(plans.Plan, "of_rows", lambda *rows: grown.append(1) or original(*rows))
    model, batch = tiny_model(), preference_batch()
    other = preference_batch(seed=1)
    with enable_prefix_sharing(model, verify=False) as sharing:
        logits_of(model, batch)
        got = logits_of(model, batch)
        assert len(grown) == 1
        batch.input_ids.data.copy_(other.input_ids)  # leaves no mark on the tensor
        changed = logits_of(model, batch)
        assert len(grown) == 2
        logits_of(model, other)
        assert len(grown) == 2
        with torch.inference_mode():
            logits_of(model, preference_batch())
        assert len(grown) == 3
    assert sharing.stats.calls == 5
    assert not torch.equal(got, changed)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(changed[real], logits_of(model, other)[real], atol=1e-5, rtol=1e-4)
    assert plans._last is None


def test_the_config_stays_live():
    """What a user changes in the config after enabling counts, as it does without sharing."""
    model, batch = tiny_model("mistral-window"), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        before = logits_of(model, batch)
        model.config.sliding_window = None
        got = logits_of(model, batch)
    want = logits_of(model, batch)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before[real], want[real], atol=1e-2)
    assert sharing.stats.calls == 2


def test_wrappers_are_seen_through():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model, batch = tiny_model(), preference_batch()
    real, want = batch.attention_mask.bool(), logits_of(model, batch)
    with enable_prefix_sharing(Wrapper(torch.compile(model, backend="eager"))) as sharing:
        torch.testing.assert_close(logits_of(model, batch)[real], want[real], atol=1e-5, rtol=1e-4)
    assert sharing.stats.calls == 1
    inner = model.model
    model.model = torch.compile(inner, backend="eager")
    with enable_prefix_sharing(model):
        assert inner._forward_pre_hooks
    assert not inner._forward_pre_hooks
    model.model = inner
    with enable_prefix_sharing(model.model) as sharing:  # the decoder stack itself
        logits_of(model, batch)
    assert sharing.stats.calls == 1


def test_sequence_classification():
    """A reward model: the head reads rows."""
    from transformers import LlamaForSequenceClassification

    config = tiny_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    model, batch = LlamaForSequenceClassification(config).train(), preference_batch()
    want = model(**batch.inputs).logits
    with enable_prefix_sharing(model) as sharing:
        torch.testing.assert_close(model(**batch.inputs).logits, want, atol=2e-5, rtol=2e-5)
    assert sharing.stats.calls == 1


def test_stats():
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        assert sharing.stats.sharing_ratio == 1.0
        logits_of(model, batch)
        logits_of(model, batch)
    stats = sharing.stats
    assert stats.padded_tokens == 2 * batch.input_ids.numel()
    assert stats.row_tokens == 2 * int(batch.attention_mask.sum())
    assert stats.packed_tokens == 2 * (9 + 4 + 6 + 7 + 5 + 2)
    assert stats.sharing_ratio == stats.row_tokens / stats.packed_tokens
    assert stats.padded_ratio == stats.padded_tokens / stats.packed_tokens


def test_stats_in_words():
    assert str(SharingStats()) == "no call shared; bypassed: none"
    stats = SharingStats(1500, 2000, 1000, 3)
    stats.add_bypassed("inputs_embeds")
    stats.add_bypassed("inputs_embeds")
    assert str(stats) == (
        "1,000 tokens computed in place of 2,000 (2.00x, of which sharing 1.50x, the rest "
        "padding), 3 calls; bypassed: inputs_embeds (2)"
    )


def test_stats_add_up():
    one, two = SharingStats(3, 4, 2, 1), SharingStats(5, 6, 4, 2)
    one.bypassed["a"] += 1
    two.bypassed.update(["a", "b"])
    total = one + two
    assert (total.row_tokens, total.padded_tokens, total.packed_tokens) == (8, 10, 6)
    assert (total.calls, total.bypassed) == (3, {"a": 2, "b": 1})


def test_ids_that_the_model_comes_to_know():
    """The embeddings of the time of the call count, under an adapter too, and real tokens only."""
    model, batch = tiny_model(), preference_batch()
    ids = batch.input_ids.masked_fill(batch.attention_mask == 0, 999)
    ids[0, 0] = 50
    collator = DataCollatorWithPrefixSharing(pad_token_id=0)
    planned = collator([{"prompt_ids": [5, 50], "chosen_ids": [6], "rejected_ids": [7]}])
    unknown = pytest.raises(ValueError, match=r"hold the id 50, .* from 0 to 49")
    with enable_prefix_sharing(model) as sharing:
        with unknown:
            model(ids, batch.attention_mask)
        model.resize_token_embeddings(51, mean_resizing=False)
        model(ids, batch.attention_mask)
        assert sharing.stats.calls == 1
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"])
    adapted = get_peft_model(tiny_model(), config)
    with enable_prefix_sharing(adapted) as sharing, unknown:
        sharing.backbones[0](planned["input_ids"], planned["attention_mask"])


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_removed_between_forward_and_backward(reentrant):
    """Checkpointed layers cannot run again without the patch, and any patch will do; other layers
    do not run again."""
    model, batch = tiny_model(), preference_batch()
    want = run(model, batch)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    def forward():
        model.zero_grad(set_to_none=True)
        with enable_prefix_sharing(model):
            logps = completion_logps(model(**batch.inputs).logits, batch)
        return (logps * torch.linspace(1.0, -0.7, 4)).sum()

    loss = forward()
    if reentrant is not None:
        with pytest.raises(RuntimeError, match="removed between a forward and its backward"):
            loss.backward()
        loss = forward()
    with enable_prefix_sharing(model) if reentrant is not None else nullcontext():
        loss.backward()
    assert_same_run((want[0], gradients(model)), want)


def test_a_failure_half_way_leaves_the_model_whole():
    """Whatever goes wrong while attention modules get their views."""
    model = tiny_model()
    model.model.layers[1].self_attn.layer_idx = "1"
    with pytest.raises(TypeError):
        enable_prefix_sharing(model)
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert not model.model._forward_pre_hooks
    model.model.layers[1].self_attn.layer_idx = 1
    enable_prefix_sharing(model).remove()


def test_backend_is_named_and_logged(caplog):
    model = tiny_model()
    with caplog.at_level(logging.INFO, "hf_prefix_patch"), enable_prefix_sharing(model) as sharing:
        assert sharing.backend == "sdpa"
    assert "enabled on LlamaModel, backend sdpa" in caplog.text
