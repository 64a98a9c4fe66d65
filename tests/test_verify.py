"""The check at enable time finds what it is there to find, and touches nothing."""

import dataclasses

import pytest
import torch
from families import FAMILIES, tiny_model
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from hf_prefix_patch import attention, enable_prefix_sharing, hooks
from hf_prefix_patch.backends.base import as_tensor, chain_blocks
from hf_prefix_patch.tree import PrefixTree


def enable_with(monkeypatch, model, **changes):
    """Enable with a changed sdpa backend."""
    changed = dataclasses.replace(attention.BACKENDS["sdpa"], **changes)
    monkeypatch.setitem(attention.BACKENDS, "sdpa", changed)
    return enable_prefix_sharing(model)


def both(blocks):
    """What the sdpa backend plans, for both of its ways to compute."""
    return {"tree_blocks": as_tensor(blocks), "tree_segments": as_tensor(blocks)}


def leaking_plan(tree: PrefixTree, needs):
    """Every chain sees all that stands before it in the packed row, other branches included."""
    chains = {block[:2] for block in chain_blocks(tree)}
    blocks = [x for q0, q1 in sorted(chains) for x in ((q0, q1, 0, q0), (q0, q1, q0, q1)) if x[3]]
    return both(blocks)


def forgetful_plan(tree: PrefixTree, needs):
    """Every chain sees itself alone: responses lose their prompt."""
    return both([x for x in chain_blocks(tree) if x[:2] == x[2:]])


@pytest.mark.parametrize("plan", [leaking_plan, forgetful_plan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_wrong_attention_is_found_and_the_model_restored(monkeypatch, plan, dtype, family):
    model = tiny_model(family, "eager").to(dtype)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    want = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match=r"hidden states of .* differ .* the model was restored"):
        enable_with(monkeypatch, model, plan=plan)
    assert not model.base_model._forward_pre_hooks
    assert model.base_model.layers[0].self_attn.config is model.config
    assert torch.equal(model(input_ids=ids).logits, want)


def test_small_initial_weights_do_not_hide_a_leak(monkeypatch):
    """The usual random initialisation, where attention is nearly uniform."""
    with pytest.raises(RuntimeError, match="verification of prefix sharing failed"):
        enable_with(monkeypatch, tiny_model(initializer_range=0.02), plan=leaking_plan)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, d) for f in FAMILIES for d in (torch.float32, torch.bfloat16, torch.float16)]
    + [("llama", torch.float64)],
)
def test_right_attention_passes_in_every_dtype(family, dtype):
    enable_prefix_sharing(tiny_model(family, "eager").to(dtype)).remove()


def test_nan_is_found_whichever_row_it_is_in():
    """The last packed token is of the last row; the unshared rows are left alone."""
    model = tiny_model()

    def spoil(norm, args, output):
        if len(output) == 1:
            output[0, -1] = float("nan")

    model.model.norm.register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match="differ from the unshared ones by nan of their norm"):
        enable_prefix_sharing(model)


def test_wrong_positions_are_found(monkeypatch):
    """The plan's positions count in the packed row: rejected responses move."""
    monkeypatch.setattr(
        PrefixTree,
        "model_kwargs",
        lambda self: {"position_ids": torch.arange(self.packed_tokens)[None]},
    )
    with pytest.raises(RuntimeError, match="verification of prefix sharing failed"):
        enable_prefix_sharing(tiny_model())


def test_layers_that_do_not_call_the_registry_are_found(monkeypatch):
    """Attention modules that kept their config run their own attention on the packed row."""
    monkeypatch.setattr(hooks.Views, "give", lambda views, decoder: None)
    monkeypatch.setattr(hooks.Views, "outdated", lambda views, decoder: None)
    with pytest.raises(RuntimeError, match="do not call transformers' attention registry"):
        enable_prefix_sharing(tiny_model())


@pytest.mark.needs(transformers=">=5")  # Qwen2-MoE is refused as a whole before
@pytest.mark.parametrize("verify", [True, False])
def test_windows_in_the_mask_alone_are_refused(verify):
    """Qwen2-MoE has a window in its mask and hands none on; a short batch would not show it."""
    config = Qwen2MoeConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=4000,
        layer_types=["sliding_attention"] * 2,
    )
    model = Qwen2MoeForCausalLM(config).train()
    message = "passes the sliding window None .* but the config says 4000"
    with pytest.raises(NotImplementedError, match=message):
        enable_prefix_sharing(model, verify=verify)(model(torch.tensor([[3, 4, 5], [3, 4, 6]])))


def test_dynamic_rotary_state_is_left_alone():
    """Frequencies grown by a long call stay grown: the short call after it is as without."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(max_position_embeddings=30, rope_parameters=rope).eval()
    long, short = torch.arange(60)[None] % 40, torch.arange(40)[None] % 37
    model(long)
    want = model(short).logits
    model(long)
    enable_prefix_sharing(model).remove()
    torch.testing.assert_close(model(short).logits, want)


def test_nothing_is_touched():
    model = tiny_model(attention_dropout=0.3).train()
    model.model.layers[1].eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    with enable_prefix_sharing(model) as sharing:
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in model.modules()] == flags
        assert all(p.grad is None for p in model.parameters())
        assert (sharing.stats.calls, sharing.stats.bypassed) == (0, {})


def test_verification_may_be_left_out(monkeypatch):
    changed = dataclasses.replace(attention.BACKENDS["sdpa"], plan=leaking_plan)
    monkeypatch.setitem(attention.BACKENDS, "sdpa", changed)
    enable_prefix_sharing(tiny_model(), verify=False).remove()


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(RuntimeError, match="meta device"):
        enable_prefix_sharing(model)
    assert not model.model._forward_pre_hooks


def test_a_wrapper_whose_calls_are_all_shared_cannot_be_verified():
    """Shared against shared would agree whatever is wrong."""

    class Cacheless(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, input_ids, attention_mask, **options):
            return self.module(input_ids, attention_mask, use_cache=False)

    model = tiny_model()
    model.model.norm.register_forward_hook(lambda norm, args, out: out + out.roll(1, 1))
    with pytest.raises(RuntimeError, match="Cacheless does not hand use_cache=True on"):
        enable_prefix_sharing(Cacheless(model))
    assert not model.model._forward_pre_hooks


@pytest.mark.needs(transformers=">=5")  # which reads rope_parameters
def test_dynamic_rotary_frequencies_of_few_positions():
    """Longer rows change them for good, so those of the noise come last."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    for positions in (16, 21, 22):
        with enable_prefix_sharing(
            tiny_model(max_position_embeddings=positions, rope_parameters=rope)
        ):
            pass
