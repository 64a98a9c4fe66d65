"""The registered function: what it refuses, and the delegation without descriptors."""

import types

import pytest
import torch
from batches import packed_inputs
from families import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hf_prefix_patch import PrefixTree, enable_prefix_sharing, support
from hf_prefix_patch.attention import prefix_sharing_attention
from hf_prefix_patch.backends.sdpa import SDPA
from hf_prefix_patch.backends.varlen import TORCH_VARLEN


def test_model_dropout_reaches_shared_attention():
    """In training mode with attention_dropout the shared forward is random, in eval it is not."""
    model = tiny_model(attention_dropout=0.5)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with enable_prefix_sharing(model) as sharing:
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        first, second = (model(ids, use_cache=False).logits for _ in range(2))
        assert torch.equal(first, second)
    assert sharing.stats.calls == 4


def packed_call(module, mask=None, backend=SDPA, **kwargs):
    tree = PrefixTree.from_rows([[1, 2], [1, 3]])
    inputs = packed_inputs(tree)
    plan = SDPA.plan(tree, None)
    return prefix_sharing_attention(module, *inputs, mask, tree_backend=backend, **plan, **kwargs)


@pytest.mark.parametrize("argument", ["sinks", "position_bias", "indices"])
def test_arguments_that_no_backend_serves_are_refused(argument):
    module = tiny_model().model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match=f"passes '{argument}'"):
        packed_call(module, **{argument: torch.ones(1)})


@pytest.mark.parametrize(
    ("call", "feature"),
    [
        ({"softcap": 2.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "sinks"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_features_that_a_backend_has_not_are_refused_at_the_call(call, feature):
    """Whatever the config said when the backend was picked."""
    module = tiny_model().model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match=f"uses {feature} .* 'torch_varlen' does not"):
        packed_call(module, backend=TORCH_VARLEN, **call)


def test_a_mask_made_by_the_layer_is_refused():
    """A layer that adds a bias of its own to the mask would lose it."""
    module = tiny_model().model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match=r"mask of its own, of shape \[1, 4, 3, 3\]"):
        packed_call(module, torch.zeros(1, 4, 3, 3))


def test_eager_attention_that_is_not_there():
    """An attention class in a file without the function that eager stands for."""
    module = torch.nn.Module()
    unpatched = types.SimpleNamespace(_attn_implementation="eager")
    module.config = types.SimpleNamespace(prefix_sharing_original=unpatched)
    message = 'no eager_attention_forward beside Module.* load the model with attn_impl.*"sdpa"'
    with pytest.raises(NotImplementedError, match=message):
        prefix_sharing_attention(module, *[torch.zeros(1, 1, 2, 4)] * 3, None)


def test_a_window_that_the_config_does_not_have_is_refused():
    model = tiny_model("mistral-window")
    with enable_prefix_sharing(model):
        module = model.model.layers[0].self_attn
        with pytest.raises(NotImplementedError, match=r"window 3 to its .* but the config says 5"):
            packed_call(module, sliding_window=3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_calls_without_descriptors_are_those_of_the_model(attention):
    model = tiny_model(attention=attention).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    want = model(ids, use_cache=True)
    with enable_prefix_sharing(model) as sharing:
        got = model(ids, use_cache=True)
    assert torch.equal(got.logits, want.logits)
    assert sharing.stats.calls == 0


def test_other_implementations_see_the_config_that_names_them(monkeypatch):
    """transformers' flash wrapper reads the implementation from the module's config."""
    monkeypatch.setattr(support, "is_known_attention", lambda name: True)
    seen = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.layer_idx))
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model = tiny_model(attention="recording").eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    want = model(ids, use_cache=True).logits
    seen.clear()
    with enable_prefix_sharing(model, verify=False):
        assert torch.equal(model(ids, use_cache=True).logits, want)
    assert seen == [("recording", 0), ("recording", 1)]


@pytest.mark.needs(transformers=">=4.54")  # before, it is set once
def test_the_implementation_may_change_while_patched():
    model = tiny_model().eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with enable_prefix_sharing(model):
        model.set_attn_implementation("eager")
        got = model(ids, use_cache=True).logits
    assert torch.equal(got, tiny_model(attention="eager").eval()(ids, use_cache=True).logits)


def test_attention_for_a_part_of_the_tokens_is_refused():
    module = tiny_model().model.layers[0].self_attn
    query, key, value = packed_inputs(PrefixTree.from_rows([[1, 2], [1, 3]]))
    with pytest.raises(NotImplementedError, match="attends with 1 of the 3 packed tokens"):
        prefix_sharing_attention(module, query[:, :, -1:], key, value, None, tree_backend=SDPA)
