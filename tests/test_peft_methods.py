"""Every method that PEFT has for causal models is shared exactly, or refused with the reason."""

import re
from pathlib import Path

import peft
import pytest
import torch
from batches import LayerTokens, assert_same_run, completion_logps, preference_batch, run
from families import tiny_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from test_peft import lora_config, wrap
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.hooks import patch_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*trust status.*"),
]

TARGETS = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}
RANK = {"r": 4, **TARGETS}

SHARED = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, **TARGETS},
    "ADAMSS": {"num_subspaces": 2, **RANK},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"boft_block_size": 4, **TARGETS},
    "C3A": {"block_size": 8, **TARGETS},
    "DEFT": RANK,
    "DELORA": RANK,
    "FOURIERFT": {"n_frequency": 20, **TARGETS},
    "FROD": {"progressbar": False, **TARGETS},
    "GLORA": RANK,
    "GRALORA": {"gralora_k": 2, **RANK},
    "HIRA": RANK,
    "HRA": RANK,
    "IA3": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {},
    "LOHA": RANK,
    "LOKR": RANK,
    "LORA": RANK,
    "MISS": RANK,
    "OFT": {"oft_block_size": 8, "r": 0, **TARGETS},
    "OSF": TARGETS,
    "PEANUT": RANK,
    "PSOFT": RANK,
    "PVERA": RANK,
    "RANDLORA": RANK,
    "ROAD": {"group_size": 8, **TARGETS},
    "SHIRA": {**RANK, "r": 2},
    "SUPERTUNING": RANK,
    "TINYLORA": RANK,
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5, 6, 7]},
    "UNILORA": {"theta_d_length": 64, **RANK},
    "VBLORA": {"num_vectors": 16, "vector_length": 8, **RANK},
    "VERA": RANK,
    "WAVEFT": {"n_frequency": 20, **TARGETS},
}

ROWS = "depends on the rows of the batch"
VIRTUAL = {"num_virtual_tokens": 3, "num_attention_heads": 4, "num_layers": 2, "token_dim": 32}
REFUSED = {
    "CARTRIDGE": ({"num_virtual_tokens": 3}, "is prompt learning"),
    "CPT": ({"cpt_token_ids": [3, 4]}, "is prompt learning"),
    "LILY": (RANK, ROWS),
    "MULTITASK_PROMPT_TUNING": ({"num_tasks": 2, **VIRTUAL}, "is prompt learning"),
    "POLY": ({"n_tasks": 2, "n_skills": 2, **RANK}, ROWS),
    "PREFIX_TUNING": ({"num_virtual_tokens": 3}, "is prompt learning"),
    "PROMPT_TUNING": ({"num_virtual_tokens": 3}, "is prompt learning"),
    "P_TUNING": ({"num_virtual_tokens": 3, "encoder_hidden_size": 16}, "is prompt learning"),
    "SHADOW": (RANK, ROWS),
    # A variant of LoRA.
    "VELORA": ({"velora_config": VeloraConfig(num_groups=4), **RANK}, ROWS),
    "XLORA": ({}, ROWS),
}

# Of LoRA: what changes initial weights, where they sit, or the arithmetic.
LORA = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "mica": {"init_lora_weights": "mica", "target_modules": ["q_proj", "up_proj"]},
    "bias": {"bias": "lora_only", "lora_bias": True},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "layers replicated": {"layer_replication": [(0, 2), (1, 2)]},
    "rank pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "head and embeddings trained": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "adapters on head and embeddings": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 4, 5, 6]},
    "kasa": {"kasa_config": KasaConfig()},
    "block-diagonal": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2
        ),
        "target_modules": ["q_proj", "o_proj"],
    },
    # Its noise is on the weights, once a call, so the same noise gives the same results.
    "monte carlo": {"monteclora_config": MontecloraConfig()},
}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}


def moved(model, scale=0.05):
    """Trainable weights away from where they do nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += scale * noise.to(parameter)
    return model


def method_model(name):
    if name == "ADAMSS":
        pytest.importorskip("sklearn", reason="AdaMSS clusters with scikit-learn")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    model = moved(wrap(tiny_model(), config(task_type="CAUSAL_LM", **SHARED[name])))
    return model.eval() if name == "PVERA" else model  # it draws noise in training


def assert_shares(make, batch, of_model=False):
    """Two models alike, one shared: same log-probs and gradients, and an adapter that counts."""
    model = make()
    torch.manual_seed(3)
    want = run(model, batch, use_cache=False)
    with torch.no_grad(), model.disable_adapter():
        off = completion_logps(model(**batch.inputs, use_cache=False).logits, batch)
    assert (off - want[0]).abs().max() > 1e-2
    assert want[1]
    model = make()
    with enable_prefix_sharing(model) as sharing:
        seen = LayerTokens(model)
        torch.manual_seed(3)
        assert_same_run(run(model, batch, use_cache=False), want, of_model)
    assert seen.shapes == [(1, sharing.stats.packed_tokens)]
    assert not sharing.stats.bypassed


@pytest.mark.parametrize("name", SHARED)
def test_shared_method(name):
    assert_shares(lambda: method_model(name), preference_batch())


@pytest.mark.parametrize("name", LORA)
def test_shared_variant_of_lora(name):
    # The priors of Monte Carlo's noise get 1e-4 of the largest gradient, by sums that cancel.
    assert_shares(
        lambda: moved(wrap(tiny_model(), lora_config(**LORA[name]))),
        preference_batch(),
        of_model=name == "monte carlo",
    )


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_adapters_on_experts(family):
    """Experts are parameters, not layers; PEFT adapts them through a parametrisation."""

    def make():
        return moved(wrap(tiny_model(family), lora_config(**EXPERTS)))

    names = [name for name, p in make().named_parameters() if p.requires_grad]
    assert any("experts" in name for name in names)
    assert_shares(make, preference_batch())


def refused_model(name, folder):
    options = REFUSED[name][0]
    if name == "XLORA":  # it mixes adapters that are trained already
        wrap(tiny_model(), lora_config()).save_pretrained(folder)
        options = {"hidden_size": 32, "adapters": {"0": str(folder)}}
    if name == "VELORA":
        return wrap(tiny_model(), lora_config(**options))
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    return wrap(tiny_model(use_cache=False), config(task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_method(name, tmp_path):
    model = refused_model(name, tmp_path)
    with pytest.raises(NotImplementedError, match=f"'default' .*{REFUSED[name][1]}"):
        enable_prefix_sharing(model)
    assert not any(patch_of(module) for module in model.modules())


@pytest.mark.parametrize("name", ["LILY", "VELORA"])
def test_methods_that_depend_on_the_batch_run_as_they_are_after_enabling(name):
    """Nothing in a call shows these; the layers themselves do."""
    batch = preference_batch()
    base = tiny_model()
    sharing = enable_prefix_sharing(base, on_bypass="ignore")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType("LORA" if name == "VELORA" else name)]
    model = moved(wrap(base, config(task_type="CAUSAL_LM", **REFUSED[name][0])))
    got = run(model, batch)
    assert sharing.stats.bypassed == {"an adapter that depends on the batch": 1}
    sharing.remove()
    want = run(model, batch)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in want[1].items())


@pytest.mark.needs(peft=f">={MIN_PEFT_VERSION}")
@pytest.mark.parametrize("name", ["LILY", "VELORA", "aLoRA"])
def test_refused_method_by_add_adapter(name):
    """transformers' own way to add an adapter, without a PeftModel around the model."""
    alora = {"alora_invocation_tokens": [7, 8], "target_modules": ["q_proj"]}
    options = {"LILY": RANK, "VELORA": REFUSED["VELORA"][0], "aLoRA": alora}[name]
    config = peft.LilyConfig if name == "LILY" else peft.LoraConfig
    model = tiny_model()
    model.add_adapter(config(**options))
    with pytest.raises(NotImplementedError, match=f"{ROWS}|activated LoRA"):
        enable_prefix_sharing(model)
    assert patch_of(model.model) is None


def test_methods_are_all_of_peft_and_all_in_the_docs():
    """A new release of PEFT with a new method has to be looked at."""
    known = set(SHARED) | set(REFUSED) - {"VELORA"}
    assert known == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    page = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()
    assert set(re.findall(r"`([A-Z][A-Z0-9_]+)`", page)) >= known
