"""Layers that are pruned, moved, exchanged or wrapped, and layer types that change."""

import copy

import pytest
import torch
from batches import assert_same_run, pad_rows, preference_batch, run
from families import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    disable_prefix_sharing,
    enable_prefix_sharing,
)
from hf_prefix_patch.bypass import LAYERS_CHANGED

# Before transformers 5 a layer knows its kind, wherever it stands.
by_place = pytest.mark.needs(transformers=">=5")
MIXED = ["qwen2-window", "gemma2", "gemma3", "gpt-oss"]


def mixed_model(family):
    """Four layers, every other one with a window that reaches beyond the rows of verification."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return tiny_model(family, num_hidden_layers=4, layer_types=kinds, sliding_window=30)


def long_batch():
    generator = torch.Generator().manual_seed(0)
    prompt, *ends = (torch.randint(3, 50, (n,), generator=generator).tolist() for n in (33, 9, 6))
    return pad_rows([prompt + end for end in ends], [33, 33], "right")


def unpatched(model, batch):
    copied = copy.deepcopy(model)
    disable_prefix_sharing(copied)
    return run(copied, batch)


def prune(model):
    del model.model.layers[1]


def turn_round(model):
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def switch_windows_off(model):
    model.config.layer_types = ["full_attention"] * 4


CHANGES = [prune, turn_round, switch_windows_off]


@by_place
@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("change", CHANGES)
def test_kinds_of_layers_that_move_after_enabling(family, change):
    """Their mask comes from their place, their window from where they were: bypassed, and equal."""
    model, batch = mixed_model(family), long_batch()
    changed = copy.deepcopy(model)
    change(changed)
    want = run(changed, batch)
    with enable_prefix_sharing(model) as sharing:
        assert_same_run(run(model, batch), run(mixed_model(family), batch))
        change(model)
        with pytest.warns(
            UserWarning, match=f"bypassed: {LAYERS_CHANGED}.* call enable_prefix_sharing"
        ):
            got = run(model, batch)
        with pytest.raises(NotImplementedError, match=r"sliding window .* but the config says"):
            enable_prefix_sharing(model)
    assert_same_run(got, want)
    assert sharing.stats.calls == sharing.stats.bypassed[LAYERS_CHANGED] == 1


@by_place
@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("change", CHANGES)
def test_kinds_of_layers_that_have_moved_are_refused(family, change):
    model = mixed_model(family)
    change(model)
    with pytest.raises(NotImplementedError, match=r"sliding window .* but the config says"):
        enable_prefix_sharing(model)


def test_a_window_that_layers_read_at_every_call():
    """Another one, none, and the first again: shared with each."""
    model, batch = tiny_model("mistral-window"), preference_batch()
    first = model.config.sliding_window
    with enable_prefix_sharing(model) as sharing:
        for window in (first - 1, None, first):
            model.config.sliding_window = window
            got = run(model, batch)
            assert_same_run(got, unpatched(model, batch))
    assert (sharing.stats.calls, sharing.stats.bypassed) == (3, {})


@by_place
@pytest.mark.parametrize("family", MIXED)
def test_a_window_that_layers_have_kept(family):
    """The masks of the unpatched model have that of the config: bypassed until it is set back."""
    model, batch = mixed_model(family), long_batch()
    with enable_prefix_sharing(model) as sharing:
        first, model.config.sliding_window = model.config.sliding_window, 6
        with pytest.warns(UserWarning, match=f"bypassed: {LAYERS_CHANGED}.*sliding_window back"):
            got = run(model, batch)
        assert_same_run(got, unpatched(model, batch))
        model.config.sliding_window = first
        got = run(model, batch)
        assert_same_run(got, unpatched(model, batch))
    assert sharing.stats.calls == sharing.stats.bypassed[LAYERS_CHANGED] == 1


@pytest.mark.parametrize("change", [prune, turn_round])
def test_layers_of_one_kind_may_move(change):
    model, batch = tiny_model(num_hidden_layers=4), long_batch()
    with enable_prefix_sharing(model) as sharing:
        change(model)
        got = run(model, batch)
    assert_same_run(got, run(model, batch))
    assert sharing.stats.calls == 1


def test_a_new_layer():
    """It has no view yet: bypassed, and shared once sharing is enabled again."""
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        model.model.layers[0] = copy.deepcopy(tiny_model(initializer_range=0.1).model.layers[0])
        with pytest.warns(UserWarning, match=f"bypassed: {LAYERS_CHANGED}"):
            unshared = run(model, batch)
        packed = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")(
            [{"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9]}]
        )
        with pytest.raises(ValueError, match=f"a packed row cannot run with: {LAYERS_CHANGED}"):
            model(**packed)
        enable_prefix_sharing(model)
        shared = run(model, batch)
    assert_same_run(unshared, run(model, batch))
    assert_same_run(shared, run(model, batch))
    assert sharing.stats.calls == 1


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_wrapped_layers_stay_shared(family):
    """As those of FSDP and of activation checkpointing are."""
    model, batch = tiny_model(family), preference_batch()
    want = run(model, batch)
    with enable_prefix_sharing(model) as sharing:
        for i, layer in enumerate(model.model.layers):
            layer.attention_type = getattr(layer, "attention_type", None)  # before transformers 5
            wrapped = Wrapped(layer)
            wrapped.attention_type = layer.attention_type
            model.model.layers[i] = wrapped
        got = run(model, batch)
    for name, gradient in want[1].items():
        parts = name.split(".")
        inside = ".".join([*parts[:3], "layer", *parts[3:]]) if "layers" in parts else name
        torch.testing.assert_close(got[1][inside], gradient, atol=1e-5, rtol=1e-4)
    assert sharing.stats.calls == 1


@pytest.mark.parametrize("called", [False, True])
def test_a_layer_that_has_left_gets_its_config_back(called):
    """When sharing is removed, or with the next call."""
    model = tiny_model()
    with enable_prefix_sharing(model):
        layer = model.model.layers[1]
        del model.model.layers[1]
        if called:
            run(model, preference_batch())
            assert layer.self_attn.config is model.config
    assert layer.self_attn.config is model.config


def test_attention_that_is_made_to_look_ahead():
    """By its own flag, as conversions to bidirectional encoders do."""
    model, batch = tiny_model(), long_batch()
    rows = {"input_ids": batch.input_ids, "use_cache": False}
    with enable_prefix_sharing(model) as sharing:
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        with pytest.warns(UserWarning, match="bypassed: bidirectional attention.* its attention"):
            got = model(**rows).logits
    torch.testing.assert_close(got, model(**rows).logits)
    assert sharing.stats.calls == 0


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_layers_that_are_added(family):
    """More than there were when the config was made."""
    options = {"layer_replication": [(0, 2), (1, 2)], "target_modules": ["q_proj"]}
    model, batch = tiny_model(family), preference_batch()
    model = get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).train()
    assert len(model.base_model.model.model.layers) == 3
    with enable_prefix_sharing(model) as sharing:
        got = run(model, batch)
    assert_same_run(got, run(model, batch))
    assert sharing.stats.calls == 1


def test_copies_of_layers_give_their_view_back():
    """Depth up-scaling: shared as they come, and nothing of sharing is left in them."""
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        layers = model.model.layers
        layers[0] = copy.deepcopy(layers[1])
        layers.append(copy.deepcopy(layers[1]))
        model.config.num_hidden_layers = 3
        for i, layer in enumerate(layers):
            layer.self_attn.layer_idx = i
        got = run(model, batch)
        for layer in layers[1:]:
            layer.self_attn.is_causal = False
        with pytest.warns(UserWarning, match="bypassed: bidirectional attention"):
            run(model, batch)
        for layer in layers[1:]:
            layer.self_attn.is_causal = True
        layers.append(copy.deepcopy(layers[1]))  # no call follows
    for layer in model.model.layers:
        assert type(layer.self_attn.config) is type(model.config)
    del model.model.layers[3]
    assert_same_run(got, run(model, batch))
    assert sharing.stats.calls == 1


def test_an_attention_module_that_is_exchanged():
    """Shared once sharing is enabled again; until then it fails on a mask of no size."""
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model):
        old = model.model.layers[0].self_attn
        model.model.layers[0].self_attn = type(old)(model.config, 0)
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(model, batch)
        enable_prefix_sharing(model)
        got = run(model, batch)
    assert_same_run(got, run(model, batch))


@by_place
def test_a_window_that_is_set_later():
    """Other backends may be needed: bypassed, and shared once sharing is enabled again."""
    model, batch = tiny_model("mistral"), long_batch()
    with enable_prefix_sharing(model) as sharing:
        model.config.sliding_window = 7
        with pytest.warns(UserWarning, match=f"bypassed: {LAYERS_CHANGED}"):
            unshared = run(model, batch)
        enable_prefix_sharing(model)
        shared = run(model, batch)
        assert model.model._prefix_sharing.last.needs.windows == {7}
    want = run(model, batch)
    assert_same_run(unshared, want)
    assert_same_run(shared, want)
    assert sharing.stats.calls == 1


def test_what_is_written_to_the_config_of_an_attention_module():
    """It is the model's own, with sharing and without: bypassed, then as if set on the model."""
    model, batch = tiny_model("mistral-window"), long_batch()
    with enable_prefix_sharing(model, on_bypass="ignore") as sharing:
        model.model.layers[0].self_attn.config.sliding_window = 7
        assert model.config.sliding_window == 7
        shared = run(model, batch)
        bypassed = run(model, batch, use_cache=True)
        model.model.layers[1].self_attn.config._attn_implementation = "eager"
        assert model.config._attn_implementation == "eager"
        in_eager = run(model, batch)
    assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (2, 1)
    want = run(model, batch)
    for got in (shared, bypassed, in_eager):
        assert_same_run(got, want)


def test_a_window_that_no_layer_has():
    """A name left over in a config, which transformers does not read there."""
    model, batch = tiny_model(sliding_window=4096), preference_batch()
    want = "set sliding_window there to what the layers were made with, None if no layer has one"
    with pytest.raises(NotImplementedError, match=want):
        enable_prefix_sharing(model)
    model.config.sliding_window = None
    with enable_prefix_sharing(model) as sharing:
        got = run(model, batch)
    assert sharing.stats.calls == 1
    assert_same_run(got, run(model, batch))
