"""Recurrent layers that follow the tree: parity, branches that cannot see each other, refusals,
and what is left of the package's hooks when the patch is gone."""

import copy
import gc
import pickle
import sys

import pytest
import torch
import transformers
import tree_recurrence
from batches import (
    LayerTokens,
    assert_same_run,
    completion_logps,
    gradients,
    left_padded_with_positions,
    pad_rows,
    preference_batch,
    run,
)
from families import HYBRIDS, tiny_model
from precision import TOLERANCE, in_doubles
from tiny_trl import add_lora
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5

import hf_prefix_patch
from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    disable_prefix_sharing,
    enable_prefix_sharing,
)

CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


def is_hooked(module=modeling_qwen3_5):
    return hasattr(module.causal_conv1d_fn, "__tree_recurrence_hook__")


@pytest.fixture(autouse=True)
def no_hook_outlives_its_test():
    yield
    tree_recurrence.uninstall()


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_logps_and_gradients_equal_the_unpatched_model(family, padding, mode, monkeypatch):
    model = in_doubles(tiny_model(family), monkeypatch)
    if CHECKPOINTING[mode] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[mode]})
        model.enable_input_require_grads()
    batch = preference_batch(padding)
    want = run(model, batch)
    seen = LayerTokens(model)
    with enable_prefix_sharing(model, verify=False) as sharing:
        got = run(model, batch)
    assert_same_run(got, want, tolerance=TOLERANCE)
    packed = sharing.stats.packed_tokens
    assert packed < batch.attention_mask.sum()
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})
    assert set(seen.shapes) == {(1, packed)}


@pytest.mark.parametrize("family", HYBRIDS)
def test_fp32_is_no_worse_than_the_unpatched_model(family, monkeypatch):
    """Enabled with verification; errors to the truth in doubles at most twice those of the
    unpatched model, over eight batches, with attention as the family loads it."""
    model = tiny_model(family)
    batches = [preference_batch("right", seed) for seed in range(8)]
    unpatched = [run(model, batch) for batch in batches]
    with enable_prefix_sharing(model) as sharing:
        shared = [run(model, batch) for batch in batches]
    assert (sharing.stats.calls, sharing.stats.bypassed) == (8, {})
    truth_model = in_doubles(copy.deepcopy(model), monkeypatch)
    truth = [run(truth_model, batch) for batch in batches]
    for ours, theirs in zip(errors(shared, truth), errors(unpatched, truth), strict=True):
        assert theirs > 0
        assert ours <= 2 * theirs


def errors(runs, truth):
    """Root mean squares of log-prob and gradient errors, each gradient in units of its largest."""
    logps = sum((r[0] - t[0]).square().sum() for r, t in zip(runs, truth, strict=True))
    grads = sum(
        ((r[1][name] - gradient) / gradient.abs().max()).square().mean()
        for r, t in zip(runs, truth, strict=True)
        for name, gradient in t[1].items()
        if gradient.any()
    )
    return float(logps) ** 0.5, float(grads) ** 0.5


def pair(chosen):
    """Two rows of one prompt; the rejected row is the same whatever the chosen one is. It comes
    after that in the packed row, where branches stand in the order of their tokens."""
    prompt = list(range(5, 14))
    return pad_rows([prompt + chosen, [*prompt, 46, 47, 48, 49]], [9, 9], "right")


@pytest.mark.parametrize("family", HYBRIDS)
def test_branches_do_not_see_each_other(family):
    """Another chosen response of the same length leaves the rejected row as it was, to the bit."""
    model = tiny_model(family).eval()
    batches = pair([31, 32, 33, 34, 35]), pair([45, 44, 43, 42, 41])
    with torch.no_grad(), enable_prefix_sharing(model) as sharing:
        one, other = (model(**batch.inputs, use_cache=False).logits for batch in batches)
    assert sharing.stats.calls == 2
    assert torch.equal(one[1, :13], other[1, :13])
    assert (one[0, 9:] - other[0, 9:]).abs().max() > 1e-2


def test_a_leak_would_show(monkeypatch):
    """The same with the package's hooks taken away, where the state runs on: the test above can
    fail, and so can the check at enable time."""
    model = tiny_model("mamba2").eval()
    batches = pair([31, 32, 33, 34, 35]), pair([45, 44, 43, 42, 41])
    with torch.no_grad(), enable_prefix_sharing(model):
        tree_recurrence.uninstall()
        one, other = (model(**batch.inputs, use_cache=False).logits for batch in batches)
    assert (one[1, 9:13] - other[1, 9:13]).abs().max() > 1e-2
    support = tree_recurrence.Support("tree", "", {"Mamba2Mixer": "tree_recurrence"})
    monkeypatch.setattr(tree_recurrence, "install", lambda layers: support)
    with pytest.raises(RuntimeError, match="verification of prefix sharing failed"):
        enable_prefix_sharing(model)


@pytest.mark.parametrize("family", ["qwen3.5", "mamba2", "lfm2"])
def test_without_the_package(family, monkeypatch):
    monkeypatch.setitem(sys.modules, "tree_recurrence", None)
    model = tiny_model(family)
    with pytest.raises(NotImplementedError, match=r"recurrent layers.*pip install tree-recurrence"):
        enable_prefix_sharing(model)
    assert not model.base_model._forward_pre_hooks
    enable_prefix_sharing(tiny_model("llama")).remove()


SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 32}
REFUSED = {
    "Mamba": SMALL,
    "FalconMamba": SMALL,
    "Jamba": {**SMALL, **HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "FalconH1": {**SMALL, **HEADS, **MAMBA},
    "RecurrentGemma": {**SMALL, **HEADS, "lru_width": 16},
    "Rwkv": {**SMALL, "attention_hidden_size": 16},
    "Zamba2": {
        **SMALL,
        **HEADS,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "layers_block_type": ["mamba", "hybrid"],
    },
    "KimiLinear": {**SMALL, **HEADS, "layer_types": ["linear_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", REFUSED)
def test_layers_that_the_package_does_not_cover(family):
    """Refused with its reason, and nothing of it is left behind."""
    config = getattr(transformers, f"{family}Config")(**REFUSED[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    reason = tree_recurrence.install(model.base_model).reason
    with pytest.raises(NotImplementedError) as refusal:
        enable_prefix_sharing(model)
    assert "recurrent layers" in str(refusal.value)
    assert reason in str(refusal.value)
    assert not model.base_model._forward_pre_hooks
    assert not hasattr(model.base_model, "_prefix_sharing")


def test_chains_do_not_do(monkeypatch):
    """Layers that keep whole rows apart, but cannot branch."""
    chains = tree_recurrence.Support("chains", "X cannot follow a tree", {"X": "model"})
    monkeypatch.setattr(tree_recurrence, "install", lambda layers: chains)
    with pytest.raises(NotImplementedError, match=r"Qwen3_5TextModel .*X cannot follow a tree"):
        enable_prefix_sharing(tiny_model("qwen3.5"))


def test_layers_that_the_package_finds_nothing_in(monkeypatch):
    """A model that says that it has a state, where the package sees none."""
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_is_stateful", True)
    with pytest.raises(NotImplementedError, match="no recurrent layers"):
        enable_prefix_sharing(tiny_model("llama"))


def test_removal_leaves_nothing():
    model, batch = tiny_model("qwen3.5"), preference_batch()
    want = run(model, batch)
    before = modeling_qwen3_5.torch_chunk_gated_delta_rule
    sharing = enable_prefix_sharing(model)
    assert is_hooked()
    sharing.remove()
    assert modeling_qwen3_5.torch_chunk_gated_delta_rule is before
    assert not any(module._forward_pre_hooks for module in model.modules())
    got = run(model, batch)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])


def test_two_models_of_one_class():
    first, second = tiny_model("qwen3.5"), tiny_model("qwen3.5")
    batch = preference_batch()
    want = run(second, batch)
    one, two = enable_prefix_sharing(first), enable_prefix_sharing(second)
    one.remove()
    assert is_hooked()
    torch.testing.assert_close(run(second, batch)[0], want[0])
    two.remove()
    assert not is_hooked()


def test_who_installed_the_package_before_keeps_it():
    model = tiny_model("qwen3.5")
    tree_recurrence.install(model)
    calls = [len(module._forward_pre_hooks) for module in (model, model.model)]
    enable_prefix_sharing(model).remove()
    assert is_hooked()
    assert [len(module._forward_pre_hooks) for module in (model, model.model)] == calls
    tree_recurrence.uninstall(model)
    assert not is_hooked()


def test_who_installs_the_package_later_takes_nothing_away():
    model, batch = tiny_model("qwen3.5"), preference_batch()
    want = run(model, batch)
    with enable_prefix_sharing(model):
        tree_recurrence.install(model)
        tree_recurrence.uninstall(model)
        torch.testing.assert_close(run(model, batch)[0], want[0])
    assert not is_hooked()


def test_enabling_twice_is_as_once():
    model, batch = tiny_model("qwen3.5"), preference_batch()
    want = run(model, batch)
    enable_prefix_sharing(model)
    tree_recurrence.uninstall()  # somebody else clears everything: enabling again mends it
    sharing = enable_prefix_sharing(model)
    torch.testing.assert_close(run(model, batch)[0], want[0])
    assert len(model.model._forward_pre_hooks) == 1
    disable_prefix_sharing(model)
    assert not is_hooked()
    assert "removed" in repr(sharing)


def test_copies_follow_the_tree_by_themselves():
    model, batch = tiny_model("mamba2"), preference_batch()
    want = run(model, batch)
    sharing = enable_prefix_sharing(model)
    reference, stored = copy.deepcopy(model), pickle.dumps(model)
    sharing.remove()
    del model, sharing
    assert is_hooked(modeling_mamba2)
    assert_same_run(run(reference, batch), want)
    assert reference.backbone._prefix_sharing.stats.calls == 1
    del reference
    gc.collect()
    assert not is_hooked(modeling_mamba2)
    assert_same_run(run(pickle.loads(stored), batch), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_removal_between_forward_and_backward(reentrant):
    """Checkpointed layers run again when the patch is gone; where there is no attention that would
    refuse, they must still follow the tree."""
    model, batch = tiny_model("mamba2"), preference_batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    want = run(model, batch)
    model.zero_grad()
    with enable_prefix_sharing(model):
        logps = completion_logps(model(**batch.inputs).logits, batch)
    weights = torch.linspace(1.0, -0.7, 4)
    (logps * weights).sum().backward()
    assert_same_run((logps.detach(), gradients(model)), want)
    del logps
    gc.collect()
    assert not is_hooked(modeling_mamba2)


def test_failed_verification_restores(monkeypatch):
    model, batch = tiny_model("qwen3.5").eval(), preference_batch()
    want = model(**batch.inputs).logits
    monkeypatch.setattr(hf_prefix_patch.verify, "TOLERANCE_FP32", (0.0, 0.0))
    with pytest.raises(RuntimeError, match="the model was restored"):
        enable_prefix_sharing(model)
    gc.collect()
    assert not is_hooked()
    assert not model.model._forward_pre_hooks
    assert torch.equal(model(**batch.inputs).logits, want)


@pytest.mark.parametrize("family", ["qwen3.5", "mamba2"])
def test_cache_by_default(family):
    """As with attention: an evaluation call without use_cache=False is bypassed, and exact."""
    model, batch = tiny_model(family).eval(), preference_batch()
    want = model(**batch.inputs).logits
    with enable_prefix_sharing(model) as sharing:
        with pytest.warns(UserWarning, match="To share such a call, pass use_cache=False"):
            got = model(**batch.inputs).logits
        assert torch.equal(got, want)
        model(**batch.inputs, use_cache=False)
        model.train()(**batch.inputs)
        assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (2, 1)
        tokens = model.eval().generate(batch.input_ids[:, :7], max_new_tokens=3, do_sample=False)
    want = model.generate(batch.input_ids[:, :7], max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, want)


BIASED = {
    "lfm2": {"conv_bias": True},
    "bamba": {"mamba_proj_bias": True},
    "mamba2": {"use_bias": True},
    "nemotron-h": {"use_bias": True},
    "granite-moe-hybrid": {"mamba_proj_bias": True},
}


@pytest.mark.parametrize("family", BIASED)
def test_a_bias_on_padding_before_a_row(family, monkeypatch):
    """The unpatched layer sets padding to zero, adds a bias to it and looks back at it: rows padded
    on the left run as they are, the others are shared."""
    model = in_doubles(tiny_model(family, **BIASED[family]), monkeypatch)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    left, right = preference_batch("left"), preference_batch("right")
    want = [run(model, batch) for batch in (left, right)]
    bypass = pytest.warns(UserWarning, match="a bias that is added to padding before a row")
    with enable_prefix_sharing(model) as sharing, bypass:
        got = [run(model, batch) for batch in (left, right)]
    assert torch.equal(got[0][0], want[0][0])
    assert_same_run(got[1], want[1], tolerance=TOLERANCE)
    assert sharing.stats.calls == 1
    assert list(sharing.stats.bypassed.values()) == [1]


def test_positions_given_by_the_caller(monkeypatch):
    """Positions that count real tokens make rows share under left padding too."""
    model = in_doubles(tiny_model("qwen3.5"), monkeypatch)
    batch, positions = left_padded_with_positions()
    want = run(model, batch, position_ids=positions)
    with enable_prefix_sharing(model, verify=False) as sharing:
        got = run(model, batch, position_ids=positions)
    assert_same_run(got, want, tolerance=TOLERANCE)
    assert sharing.stats.packed_tokens == 33


FEATURES = [
    {"prompt_ids": [5, 6, 7, 8, 9], "chosen_ids": [10, 11, 12], "rejected_ids": [10, 13]},
    {"prompt_ids": [5, 6, 14, 15], "chosen_ids": [16, 17], "rejected_ids": [18, 19, 20, 21]},
]


@pytest.mark.parametrize("family", [name for name in HYBRIDS if name != "mamba2"])
def test_packed_batches(family, monkeypatch):
    """A collator's packed row gives the log-probs and gradients of its rows, unpatched."""
    model = in_doubles(tiny_model(family), monkeypatch)
    results = []
    for layout in ("rows", "packed"):
        batch = DataCollatorWithPrefixSharing(0, layout=layout)(FEATURES)
        model.zero_grad()
        if layout == "packed":
            sharing = enable_prefix_sharing(model, verify=False)
        logps = hf_prefix_patch.completion_logps(model, batch)
        (logps * torch.linspace(1.0, -0.7, 4)).sum().backward()
        results.append((logps.detach().double(), gradients(model)))
    assert_same_run(results[1], results[0], tolerance=TOLERANCE)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})
    sharing.remove()


def test_a_packed_row_needs_a_model_that_hands_on_its_descriptors():
    """Mamba2ForCausalLM hands its decoder stack no arguments that it does not know."""
    model = tiny_model("mamba2")
    with enable_prefix_sharing(model, on_bypass="ignore"):
        batch = DataCollatorWithPrefixSharing(0, layout="packed")(FEATURES)
        with pytest.raises(RuntimeError, match="without its descriptors"):
            hf_prefix_patch.completion_logps(model, batch)


def test_adapters():
    """LoRA around projections inside the recurrent layers, wrapped before enabling."""
    model = add_lora(tiny_model("qwen3.5"), "q_proj", "in_proj_qkv", "in_proj_z", "out_proj")
    batch = preference_batch()
    want = run(model, batch)
    with enable_prefix_sharing(model) as sharing:
        assert_same_run(run(model, batch), want, of_model=True)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})
    assert any("linear_attn" in name for name in want[1])
