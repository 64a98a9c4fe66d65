"""PEFT around and under the patch: gradients, references, saving, merging, what is refused."""

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
from families import CHECKPOINTING, set_checkpointing, tiny_model
from peft import (
    EvaConfig,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
)
from safetensors.torch import load_file

from hf_prefix_patch import disable_prefix_sharing, enable_prefix_sharing
from hf_prefix_patch.hooks import patch_of

# Reentrant checkpointing says so of every forward without gradients.
pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    # Of PEFT 0.15, about a model that has no folder to look into.
    pytest.mark.filterwarnings("ignore:Could not find a config file in :UserWarning"),
]

PROMPT_LEARNING = {
    "prompt": (PromptTuningConfig, {}),
    "p-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "prefix": (PrefixTuningConfig, {}),
}
INVOCATION = [7, 8]


def lora_config(**options):
    """An adapter that does something: B is not zero."""
    defaults = {
        "r": 4,
        "lora_alpha": 2,
        "init_lora_weights": False,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(defaults | options))


def wrap(model, config):
    """The same adapter weights at every call."""
    torch.manual_seed(1)
    return get_peft_model(model, config)


def lora_model(**options):
    return wrap(tiny_model(), lora_config(**options))


@pytest.mark.parametrize("order", ["wrap-then-enable", "enable-then-wrap"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}],
    ids=["lora", "dora", "lora-and-embeddings"],
)
def test_adapter_gradients(order, options):
    batch = preference_batch()
    want = run(lora_model(**options), batch)
    if order == "wrap-then-enable":
        model = lora_model(**options)
        sharing = enable_prefix_sharing(model)
    else:
        model = tiny_model()
        sharing = enable_prefix_sharing(model)
        model = wrap(model, lora_config(**options))
    seen = LayerTokens(model)
    assert_same_run(run(model, batch), want)
    assert len(want[1]) >= 2 * 2 * 7  # A and B in two layers of seven projections
    assert seen.shapes == [(1, sharing.stats.packed_tokens)]
    assert not sharing.stats.bypassed


def policy_and_reference(model, batch):
    """A DPO loss whose reference, the model without its adapter, runs before backward."""
    model.zero_grad(set_to_none=True)
    policy = completion_logps(model(**batch.inputs, use_cache=False).logits, batch)
    with model.disable_adapter():
        reference = completion_logps(logits_of(model, batch), batch)
    chosen, rejected = (policy - reference).chunk(2)
    (-torch.nn.functional.logsigmoid(chosen - 0.5 * rejected)).sum().backward()
    return torch.stack([policy.detach(), reference]), gradients(model)


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_reference_by_disabled_adapter_between_forward_and_backward(mode):
    batch, model = preference_batch(), lora_model()
    set_checkpointing(model, mode)
    want = policy_and_reference(model, batch)
    sharing = enable_prefix_sharing(model)
    assert_same_run(policy_and_reference(model, batch), want)
    policy, reference = want[0]
    assert (policy - reference).abs().min() > 1e-2
    assert sharing.stats.calls == 2
    assert not sharing.stats.bypassed


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_reference_of_another_batch_between_forward_and_backward(mode):
    """What a checkpointed layer needs to run again belongs to its own call, not to the last."""

    def step():
        model.zero_grad(set_to_none=True)
        logps = completion_logps(model(**batch.inputs, use_cache=False).logits, batch)
        with model.disable_adapter():
            logits_of(model, other)
        (logps * torch.tensor([1.0, 0.4, -0.5, -0.8])).sum().backward()
        return logps.detach(), gradients(model)

    batch, other, model = preference_batch(), preference_batch("left"), lora_model()
    set_checkpointing(model, mode)
    want = step()
    with enable_prefix_sharing(model) as sharing:
        assert_same_run(step(), want)
    assert sharing.stats.calls == 2


def train(model, batch, steps=3):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(steps):
        run(model, batch)
        optimizer.step()


def test_adapter_of_a_shared_run_is_an_ordinary_adapter(tmp_path):
    batch, start = preference_batch(), logits_of(lora_model(), preference_batch())
    unshared, shared = lora_model(), lora_model()
    train(unshared, batch)
    unshared.save_pretrained(tmp_path / "unshared")
    sharing = enable_prefix_sharing(shared)
    train(shared, batch)
    shared.save_pretrained(tmp_path / "shared")
    assert sharing.stats.calls == 3
    want, got = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("unshared", "shared")
    )
    assert got.keys() == want.keys()
    configs = [(tmp_path / n / "adapter_config.json").read_text() for n in ("unshared", "shared")]
    assert configs[0] == configs[1]
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "shared").train()
    outputs, shared_outputs = logits_of(loaded, batch), logits_of(shared, batch)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(shared_outputs[real], outputs[real], atol=2e-5, rtol=2e-5)
    assert (outputs - start).abs().max() > 0.1, "training moved nothing"
    sharing.remove()
    assert torch.equal(logits_of(shared, batch), outputs)


def test_merge_and_unload_of_a_patched_model():
    batch = preference_batch()
    real = batch.attention_mask.bool()
    want = lora_model().merge_and_unload()
    model = lora_model()
    sharing = enable_prefix_sharing(model)
    merged = model.merge_and_unload()
    got = logits_of(merged, batch)
    torch.testing.assert_close(got[real], logits_of(want, batch)[real], atol=2e-5, rtol=2e-5)
    assert sharing.stats.calls == 1
    sharing.remove()
    assert torch.equal(logits_of(merged, batch), logits_of(want, batch))
    assert merged.state_dict().keys() == want.state_dict().keys()
    assert (logits_of(want, batch) - logits_of(tiny_model(), batch)).abs().max() > 0.1


def test_unload_of_a_patched_model():
    """The base model comes back, and stays patched."""
    batch, plain = preference_batch(), tiny_model()
    real = batch.attention_mask.bool()
    model = lora_model()
    sharing = enable_prefix_sharing(model)
    base = model.unload()
    got = logits_of(base, batch)
    torch.testing.assert_close(got[real], logits_of(plain, batch)[real], atol=2e-5, rtol=2e-5)
    assert sharing.stats.calls == 1
    disable_prefix_sharing(base)
    assert torch.equal(logits_of(base, batch), logits_of(plain, batch))


def two_adapters():
    model = lora_model()
    torch.manual_seed(2)
    model.add_adapter("second", lora_config(r=2, target_modules=["q_proj", "v_proj"]))
    return model


def test_switching_adapters():
    """The active adapter is looked up by the layers at every call, as without sharing."""
    batch, plain, model = preference_batch(), two_adapters(), two_adapters()
    sharing = enable_prefix_sharing(model)
    seen = {}
    for name in ("second", "default", "second"):
        plain.set_adapter(name)
        model.set_adapter(name)
        want = run(plain, batch)
        assert_same_run(run(model, batch), want)
        assert all(name in parameter for parameter in want[1])
        seen[name] = want[0]
    assert (seen["second"] - seen["default"]).abs().min() > 1e-2
    assert (sharing.stats.calls, sharing.stats.bypassed) == (3, {})


def test_a_reference_adapter_between_forward_and_backward():
    """What TRL does with `ref_adapter_name`."""

    def step(model):
        model.set_adapter("default")
        model.zero_grad(set_to_none=True)
        policy = completion_logps(model(**batch.inputs, use_cache=False).logits, batch)
        model.set_adapter("second")
        reference = completion_logps(logits_of(model, batch), batch)
        model.set_adapter("default")
        ((policy - reference) * torch.tensor([1.0, 0.4, -0.5, -0.8])).sum().backward()
        return torch.stack([policy.detach(), reference]), gradients(model)

    batch, model = preference_batch(), two_adapters()
    want = step(model)
    with enable_prefix_sharing(model) as sharing:
        assert_same_run(step(model), want)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (2, {})


def test_an_adapter_loaded_into_a_patched_model(tmp_path):
    batch = preference_batch()
    saved = wrap(tiny_model(), lora_config(r=3))
    saved.save_pretrained(tmp_path)
    model = lora_model()
    sharing = enable_prefix_sharing(model)
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    model.set_adapter("loaded")
    got, want = run(model, batch), run(saved, batch)
    want = want[0], {n.replace("default", "loaded"): gradient for n, gradient in want[1].items()}
    assert_same_run(got, want)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})


def mixed_model():
    model = tiny_model()
    torch.manual_seed(1)
    model = PeftMixedModel(model, lora_config(target_modules=["q_proj", "v_proj"]), "first")
    model.add_adapter("second", LoHaConfig(r=4, target_modules=["k_proj"], init_weights=False))
    model.set_adapter(["first", "second"])
    return model


def test_mixed_adapters():
    """Methods side by side, in PEFT's wrapper for that."""
    batch, model = preference_batch(), mixed_model()
    want = run(mixed_model(), batch)
    with enable_prefix_sharing(model) as sharing:
        assert_same_run(run(model, batch), want)
        assert {"first", "second"} <= {part for name in want[1] for part in name.split(".")}
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})
    assert patch_of(model.base_model.model.model) is None


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")
def test_initialisation_from_data_sees_rows():
    """EVA picks the activations of real tokens out of rows, by hooks on the layers."""

    def adapter(patched):
        torch.manual_seed(1)
        options = {"init_lora_weights": "eva", "eva_config": EvaConfig()}
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
        model = get_peft_model(tiny_model(use_cache=False), config)
        sharing = enable_prefix_sharing(model, on_bypass="ignore") if patched else None
        batches = [preference_batch(seed=seed).inputs for seed in range(3)]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        return sharing, get_peft_model_state_dict(model)

    _, want = adapter(patched=False)
    sharing, got = adapter(patched=True)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], weight) for name, weight in want.items())
    assert (sharing.stats.calls, set(sharing.stats.bypassed)) == (
        0,
        {"PEFT reads the activations of rows"},
    )


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_generate_gives_the_same_tokens(sample):
    batch, model = preference_batch("left"), lora_model().eval()

    def generate():
        torch.manual_seed(0)
        return model.generate(
            **batch.inputs, max_new_tokens=12, do_sample=sample, eos_token_id=None
        )

    want = generate()
    sharing = enable_prefix_sharing(model)
    assert torch.equal(generate(), want)
    assert want.shape[1] == batch.input_ids.shape[1] + 12
    assert sharing.stats.calls == 0
    assert set(sharing.stats.bypassed) == {"key/value cache"}
    sharing.remove()
    assert torch.equal(generate(), want)


def prompt_learning_model(kind, model):
    cls, options = PROMPT_LEARNING[kind]
    return wrap(model, cls(task_type="CAUSAL_LM", num_virtual_tokens=3, **options))


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
def test_prompt_learning_is_refused(kind):
    model = prompt_learning_model(kind, tiny_model())
    with pytest.raises(NotImplementedError, match=r"'default' is prompt learning .*; use LoRA"):
        enable_prefix_sharing(model)
    assert patch_of(model.get_base_model().base_model) is None


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
def test_prompt_learning_after_enabling_runs_as_it_is(kind):
    batch = preference_batch()
    want = logits_of(prompt_learning_model(kind, tiny_model()).eval(), batch)
    model = tiny_model()
    sharing = enable_prefix_sharing(model)
    model = prompt_learning_model(kind, model).eval()
    assert torch.equal(logits_of(model, batch), want)
    assert sharing.stats.calls == 0
    assert sum(sharing.stats.bypassed.values()) == 1


def alora_config(**options):
    targets = ["q_proj", "v_proj"]
    return lora_config(target_modules=targets, alora_invocation_tokens=INVOCATION, **options)


@pytest.mark.needs(peft=">=0.18")
def test_alora_is_refused():
    model = wrap(tiny_model(), alora_config())
    with pytest.raises(NotImplementedError, match=r"is an activated LoRA .*; set alora_invocation"):
        enable_prefix_sharing(model)
    assert patch_of(model.get_base_model().base_model) is None


@pytest.mark.needs(peft=">=0.18")
@pytest.mark.parametrize("layers", [None, [1]])
def test_alora_after_enabling_is_bypassed(layers):
    """The adapter is on in the last tokens of a prompt: other tokens for rows of other length."""
    batch = preference_batch()
    batch.input_ids[0::2, 7:9] = torch.tensor(INVOCATION)
    alora = wrap(tiny_model(), alora_config(layers_to_transform=layers))
    want = run(alora, batch)
    with alora.disable_adapter():
        off = completion_logps(logits_of(alora, batch), batch)
    assert (off - want[0]).abs()[0::2].min() > 1e-2
    model = tiny_model()
    sharing = enable_prefix_sharing(model)
    model = wrap(model, alora_config(layers_to_transform=layers))
    with pytest.warns(UserWarning, match="prefix sharing is bypassed: adapters chosen by row"):
        got = run(model, batch)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in want[1].items())
    assert sharing.stats.calls == 0
    assert sharing.stats.bypassed == {"adapters chosen by row": 1}


def poly_config():
    return PolyConfig(
        task_type="CAUSAL_LM", n_tasks=4, n_skills=2, r=4, target_modules=["q_proj", "v_proj"]
    )


def test_poly_is_refused():
    with pytest.raises(
        NotImplementedError, match=r"\(PolyConfig\) depends on the rows of the batch"
    ):
        enable_prefix_sharing(wrap(tiny_model(), poly_config()))


@pytest.mark.parametrize("kind", ["adapter_names", "adapter_names and tokens", "poly"])
def test_adapters_by_row_run_as_they_are(kind):
    """Rows of one batch with different adapters: equal tokens are not one."""
    batch = preference_batch()
    base = tiny_model()
    sharing = enable_prefix_sharing(base)
    if kind == "poly":
        model, choice = wrap(base, poly_config()), {"task_ids": torch.arange(4)}
    else:
        # Trained tokens are the first of PEFT's layers, and it gives the choice to others.
        options = {"trainable_token_indices": [3, 4]} if "tokens" in kind else {}
        model = wrap(base, lora_config(**options))
        model.add_adapter("other", lora_config(**options))
        choice = {"adapter_names": ["default", "other"] * 2}
    model.eval()
    with torch.no_grad():
        got = model(**batch.inputs, **choice, use_cache=False).logits
        assert sharing.stats.bypassed == {"adapters chosen by row": 1}
        sharing.remove()
        assert torch.equal(model(**batch.inputs, **choice, use_cache=False).logits, got)
