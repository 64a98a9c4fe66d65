"""FLOPs against torch's own count of eager steps, whose attention computes all pairs."""

import numpy as np
import pytest
import torch
from composites import COMPOSITES, tiny_composite
from families import tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    JetMoeConfig,
    T5Config,
)

from hf_prefix_patch.flops import DecoderShape, Work, step_flops, visible_pairs

IDS = torch.arange(24).view(2, 12) + 3


def all_pairs(model):
    """Work of eager attention, which masks what it has computed; logits of every token."""
    shape = DecoderShape.of(model.config)
    rows, length = IDS.shape
    pairs = dict.fromkeys(shape.heads, rows * length**2)
    return shape, Work(IDS.numel(), pairs, IDS.numel())


def counted(model, reference=False):
    """FLOPs of a step, as torch counts them."""
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        if reference:
            with torch.no_grad():
                model(input_ids=IDS)
        model(input_ids=IDS, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


FAMILIES = ["llama", "mistral-window", "gemma2", "phi3", "qwen3-moe", "mixtral", "gpt-oss"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reference", [False, True])
def test_step(family, reference):
    model = tiny_model(family, "eager", output_router_logits=False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # whose products torch counts
    shape, work = all_pairs(model)
    got = step_flops(shape, work, reference=reference).total
    assert got == pytest.approx(counted(model, reference=reference), rel=2e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen(checkpointing):
    """Gradients flow through all weights and into none."""
    model = tiny_model("llama", "eager").requires_grad_(False)
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shape, work = all_pairs(model)
    got = step_flops(shape, work, frozen=True, checkpointing=checkpointing)
    assert got.total == pytest.approx(counted(model), rel=2e-3)
    assert got.linear == 2 * IDS.numel() * shape.weights * (2 + checkpointing)
    assert got.head == 2 * IDS.numel() * shape.head * 2  # not checkpointed


def test_adapters_are_what_is_left_out():
    rank = 4
    model = get_peft_model(
        tiny_model("llama", "eager"), LoraConfig(r=rank, target_modules=["q_proj", "down_proj"])
    )
    model.enable_input_require_grads()
    shape, work = all_pairs(model)
    sizes = (32 + 32) + (48 + 32)  # in and out of both, in each of two layers
    adapters = 2 * IDS.numel() * 2 * rank * sizes * 3
    got = step_flops(shape, work, frozen=True).total
    assert got + adapters == pytest.approx(counted(model), rel=2e-3)
    assert adapters > 0.02 * got


def test_logits_that_are_computed_again():
    shape, work = all_pairs(tiny_model())
    once, again = (step_flops(shape, work, head_again=x, frozen=True) for x in (False, True))
    assert (once.linear, once.attention) == (again.linear, again.attention)
    assert again.head / once.head == 3 / 2


def test_heads_of_two_sizes():
    """Keys of 8 + 4, values of 6: multi-head latent attention; two experts of four, one shared."""
    config = DeepseekV3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        attn_implementation="eager",
    )
    model = DeepseekV3ForCausalLM(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    shape, work = all_pairs(model)
    assert shape.heads == {None: 2 * 4 * (12 + 6)}
    assert step_flops(shape, work).total == pytest.approx(counted(model), rel=5e-3)


def test_windows_by_layer():
    shape = DecoderShape.of(tiny_model("gemma2").config)
    assert shape.heads == {5: 4 * 16, None: 4 * 16}
    work = Work(0, {5: 10, None: 100})
    assert step_flops(shape, work).attention == 2 * 4 * 16 * (10 + 100) * 3


def test_layers_without_attention():
    assert DecoderShape.of(tiny_model("qwen3.5").config).heads == {None: 4 * 16}
    assert DecoderShape.of(tiny_model("mamba2").config).heads == {}


def test_text_decoders_alone_count():
    """The same sizes with eyes and without."""
    composite = tiny_composite("qwen2.5-vl").config
    seen, plain = (DecoderShape.of(c) for c in (composite, tiny_model("qwen2").config))
    assert (seen.weights, seen.heads) == (plain.weights, plain.heads)


def test_a_large_model_takes_no_memory():
    config = GPT2Config(n_layer=48, n_embd=12800, n_head=100)
    assert DecoderShape.of(config).weights == 48 * 12 * 12800**2


def test_models_that_are_not_known():
    with pytest.raises(ValueError, match="one of 't5', but must be that of a causal LM"):
        DecoderShape.of(T5Config())


def test_experts_under_other_names():
    """JetMoE has them in its linear layers, and a router under the name `experts`."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    sizes |= {"num_key_value_heads": 2, "kv_channels": 8, "num_experts_per_tok": 2}
    few, many = (
        DecoderShape.of(JetMoeConfig(num_local_experts=count, **sizes)) for count in (4, 16)
    )
    routers = 2 * 2 * 32  # of attention and of the MLP, in two layers
    assert many.weights - few.weights == routers * (16 - 4)


def test_experts_of_an_unknown_number(monkeypatch):
    config = tiny_model("qwen3-moe").config
    monkeypatch.setattr("hf_prefix_patch.flops._EXPERTS_USED", ("moe_k",))
    with pytest.raises(ValueError, match=r"has experts, but its config none of \('moe_k',\)"):
        DecoderShape.of(config)


def test_attention_that_is_not_recognised(monkeypatch):
    monkeypatch.setattr("hf_prefix_patch.flops.is_attention", lambda module: False)
    with pytest.raises(ValueError, match="no attention layer with a layer_idx was found in Llama"):
        DecoderShape.of(tiny_model().config)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_visible_pairs(window):
    """Against the keys that each token of a row may see."""
    lengths = np.array([1, 3, 13, 12])
    want = [sum(min(i + 1, window or i + 1) for i in range(n)) for n in lengths]
    assert visible_pairs(lengths, window).tolist() == want


@pytest.mark.parametrize("family", COMPOSITES)
def test_composites(family):
    config = tiny_composite(family).config
    if family == "voxtral":
        with pytest.raises(ValueError, match="one of 'voxtral', but must be that of a causal LM"):
            DecoderShape.of(config)
    else:
        assert DecoderShape.of(config).weights > 0
