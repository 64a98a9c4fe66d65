"""`compare_sharing` passes right models, finds wrong ones, and leaves nothing behind."""

import dataclasses
import re

import pytest
import torch
from batches import LayerTokens
from composites import tiny_composite
from families import FAMILIES, sizes, tiny_model
from peft import get_peft_model
from test_verify import forgetful_plan, leaking_plan
from tiny_trl import lora_config, perturb
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from hf_prefix_patch import DataCollatorWithPrefixSharing, attention, enable_prefix_sharing
from hf_prefix_patch import comparison as comparison_module
from hf_prefix_patch.commands.verify import random_pairs
from hf_prefix_patch.comparison import Comparison, Difference, compare_sharing
from hf_prefix_patch.hooks import patch_of
from hf_prefix_patch.tree import PrefixTree

RIGHT = attention.BACKENDS["sdpa"].attend


def batch_of(model, pairs=2, seed=0):
    """Random pairs of ragged lengths, the first two with one prompt."""
    examples = random_pairs(model.config, pairs, 48, seed)
    return DataCollatorWithPrefixSharing(pad_token_id=0)(examples)


def change_backend(monkeypatch, **changes):
    changed = dataclasses.replace(attention.BACKENDS["sdpa"], **changes)
    monkeypatch.setitem(attention.BACKENDS, "sdpa", changed)


def detached_key(module, query, key, value, **options):
    """Right results, and no gradient for keys."""
    return RIGHT(module, query, key.detach(), value, **options)


def detached_shared_key(module, query, key, value, **options):
    """No gradient for the keys of the first tokens, which are those of a prompt."""
    key = torch.cat([key[:, :, :8].detach(), key[:, :, 8:]], dim=2)
    return RIGHT(module, query, key, value, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_models_are_equal(family, dtype):
    model = tiny_model(family).to(dtype)
    seen = LayerTokens(model)
    found = compare_sharing(model, batch_of(model, seed=list(FAMILIES).index(family)))
    assert found.verdict == "equal", found.mismatches
    assert found.quantity == "log-probs"
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert (found.backend, found.unshared_seconds) == ("sdpa", [])
    assert len(found.gradients) == len(list(model.parameters()))
    assert found.row_tokens > found.packed_tokens
    # Warm-up, unshared; what a shared call shows, shared; three times noise, row by row.
    packed, rows = (1, found.packed_tokens), seen.shapes[0]
    assert seen.shapes[:4] == [rows] * 2 + [packed] * 2
    assert len(seen.shapes) == 4 + 3 * rows[0]
    assert sum(length for _, length in seen.shapes[4:]) == 3 * found.row_tokens
    assert rows[0] * rows[1] == found.padded_tokens
    assert 0 < found.shared_bytes < found.unshared_bytes


@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
@pytest.mark.parametrize("family", ["mamba2", "lfm2"])
def test_hybrids_are_equal(family):
    pytest.importorskip("tree_recurrence", reason="hybrids need tree-recurrence")
    model = tiny_model(family)
    assert compare_sharing(model, batch_of(model)).verdict == "equal"


@pytest.mark.parametrize("leaking", ["chosen", "rejected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_leak_between_answers_is_found_where_it_is(monkeypatch, family, dtype, leaking):
    """The answer that is laid out last sees the other one."""
    change_backend(monkeypatch, plan=leaking_plan)
    model = tiny_model(family).to(dtype)
    (pair,) = random_pairs(model.config, 1, 48)
    first, last = [5, *pair["chosen_ids"]], [9, *pair["rejected_ids"]]
    other = "chosen" if leaking == "rejected" else "rejected"
    pair |= {f"{other}_ids": first, f"{leaking}_ids": last}
    batch = DataCollatorWithPrefixSharing(pad_token_id=0)([pair])
    found = compare_sharing(model, batch, gradients=False)
    assert found.verdict == "mismatch"
    wrong = {f"log-probs of {leaking}, max", f"log-probs of {leaking}, mean"}
    assert found.mismatches.keys() == wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lost_prompts_are_found(monkeypatch, dtype):
    change_backend(monkeypatch, plan=forgetful_plan)
    model = tiny_model().to(dtype)
    assert compare_sharing(model, batch_of(model), gradients=False).verdict == "mismatch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_positions_are_found(monkeypatch, dtype):
    """The plan's positions count in the packed row: rejected answers move."""
    right = PrefixTree.model_kwargs
    monkeypatch.setattr(
        PrefixTree,
        "model_kwargs",
        lambda self: right(self) | {"position_ids": torch.arange(self.packed_tokens)[None]},
    )
    model = tiny_model().to(dtype)
    found = compare_sharing(model, batch_of(model), gradients=False)
    assert any("rejected" in name for name in found.mismatches)


@pytest.mark.parametrize("attend", [detached_key, detached_shared_key])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.float16), ("mixtral", torch.bfloat16)],
)
def test_wrong_gradients_of_right_results_are_found(monkeypatch, family, dtype, attend):
    """In the keys' own weights first of all; results differ by noise alone."""
    change_backend(monkeypatch, attend=attend)
    model = tiny_model(family).to(dtype)
    found = compare_sharing(model, batch_of(model))
    assert found.verdict == "mismatch"
    assert all(x.explained for x in found.differences.values())
    assert "k_proj" in next(iter(found.mismatches))
    assert "k_proj" in found.worst_gradient[0]


def test_a_gradient_that_counts_one_row_too_little_is_found(monkeypatch):
    """A shared token must get the gradients of all its rows."""
    right = PrefixTree.unpack

    def unpack(self, x):
        rows = right(self, x)
        return torch.cat([rows[:-1], rows[-1:].detach()])

    monkeypatch.setattr(PrefixTree, "unpack", unpack)
    model = tiny_model().to(torch.bfloat16)
    found = compare_sharing(model, batch_of(model))
    assert all(x.explained for x in found.differences.values())
    assert found.verdict == "mismatch"


def test_classifiers_are_compared_by_their_scores(monkeypatch):
    config = LlamaConfig(**sizes(), num_labels=2, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    found = compare_sharing(model, batch_of(model))
    assert (found.quantity, found.verdict) == ("scores", "equal")
    change_backend(monkeypatch, plan=leaking_plan)
    assert "scores of rejected, max" in compare_sharing(model, batch_of(model)).mismatches


def test_adapters_under_checkpointing():
    model = get_peft_model(tiny_model(), lora_config())
    perturb(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    for layer in model.get_base_model().model.layers:
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, do=checkpoint: (
            calls.append(0) or do(*args)
        )
    found = compare_sharing(model, batch_of(model))
    assert found.verdict == "equal"
    assert len(found.gradients) == 16
    assert len(calls) == 2 * (4 + 3 * 4)


def starcoder(**changes):
    """Its layers drop out by themselves."""
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    model = Starcoder2ForCausalLM(Starcoder2Config(**config, **changes))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def test_dropout_of_checkpointed_layers_is_off(monkeypatch):
    model = starcoder(embedding_dropout=0.5, residual_dropout=0.5)
    layer = model.model.layers[0]  # as DBRX's, which asks its own flag in what is checkpointed
    layer.mlp.register_forward_hook(lambda m, _, y: torch.dropout(y, 0.5, train=layer.training))
    state = torch.random.get_rng_state()
    found = compare_sharing(model, batch_of(model))
    assert found.verdict == "equal"
    assert max(x.error for x in found.differences.values()) < 1e-5
    assert compare_sharing(model, batch_of(model), gradients=False).verdict == "equal"
    assert torch.equal(torch.random.get_rng_state(), state)
    change_backend(monkeypatch, attend=detached_key)
    found = compare_sharing(model, batch_of(model))
    assert found.verdict == "mismatch"
    assert all("k_proj" in name for name in list(found.mismatches)[:2])


def test_a_model_that_draws_random_numbers_is_refused():
    model = starcoder()
    model.model.norm.register_forward_hook(lambda m, _, y: torch.dropout(y, 0.1, train=True))
    with pytest.raises(ValueError, match="Starcoder2ForCausalLM draws random numbers in eval"):
        compare_sharing(model, batch_of(model))


def test_nothing_is_left_behind():
    """Dropout, which would tell two runs apart, is off meanwhile."""
    model = tiny_model(attention_dropout=0.3).train()
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.grad = torch.ones_like(weight)
    state, values = torch.get_rng_state(), weight.detach().clone()
    found = compare_sharing(model, batch_of(model), repeats=2)
    assert found.verdict == "equal"
    assert len(found.unshared_seconds) == len(found.shared_seconds) == 2
    assert min(found.unshared_seconds + found.shared_seconds) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert torch.equal(weight, values)
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert all(module.training for module in model.modules())
    assert patch_of(model.model) is None
    assert not model.get_input_embeddings()._forward_hooks


def comparison(differences=None, gradients=None):
    equal = Difference(1.0, 1.0, 2.0)
    names = [f"{which}, {how}" for which in ("chosen", "rejected") for how in ("max", "mean")]
    return Comparison(
        quantity="log-probs",
        dtype="float32",
        backend="sdpa",
        differences=dict.fromkeys(names, equal) | (differences or {}),
        gradients=gradients or {},
        size=3.0,
        row_tokens=3,
        padded_tokens=4,
        packed_tokens=2,
        unshared_bytes=2,
        shared_bytes=1,
        unshared_seconds=[],
        shared_seconds=[],
    )


@pytest.mark.parametrize(
    ("shares", "draws"),
    [
        ([0.5] * 3, 3),
        ([1.5] * 5 + [0.9], 6),  # the first that explains it
        ([0.5, 1.5, 0.5, 20.0], 3),
        ([1.5] * 12, 12),
        ([20.0] * 3, 3),
        ([float("nan")] * 3, 3),
    ],
)
def test_doubt_takes_more_draws(monkeypatch, capsys, shares, draws):
    """As many as explain a difference of the size of the noise; one far beyond it needs no more."""
    model = tiny_model()
    made, given = [], iter(shares)

    def of_gradients(shared, noises, dtype):
        made.append(len(noises))
        return {"weight": Difference(error=next(given), noise=0.5, allowed=1.0)}

    monkeypatch.setattr(comparison_module, "_of_gradients", of_gradients)
    found = compare_sharing(model, batch_of(model), repeats=1, progress=True)
    assert made == list(range(1, draws + 1))
    shown = capsys.readouterr()
    assert f"| {5 + draws}/{5 + draws} [" in shown.err.splitlines()[-1]
    assert not shown.out
    assert found.gradients["weight"].error == pytest.approx(shares[draws - 1], nan_ok=True)


def test_verdicts():
    assert comparison().verdict == "equal"
    assert comparison({"chosen, mean": Difference(1.0, 2.0, 4.0)}).verdict == "too noisy"
    noise, right = Difference(0.9, 0.9, 1.8), Difference(0.1, 0.1, 0.2)
    found = comparison(gradients={"a": noise, "b": right})
    assert (found.verdict, found.unjudged) == ("equal", ["a"])
    assert comparison(gradients={"a": noise}).verdict == "too noisy"
    wrong, nothing = Difference(0.5, 0.1, 0.2), Difference(float("nan"), 0.1, 0.2)
    found = comparison(gradients={"a": wrong, "b": nothing, "c": right, "d": noise})
    assert found.verdict == "mismatch"
    assert list(found.mismatches) == ["gradient of b", "gradient of a"]
    assert found.worst_gradient == ("b", nothing)
    assert found.to_dict()["mismatches"] == ["gradient of b", "gradient of a"]


def test_bad_batches():
    model = tiny_model()
    batch = dict(batch_of(model))
    for changes, message in (
        ({"completion_mask": batch["completion_mask"][:, 1:]}, "must all be [2 B, L] for B pairs"),
        ({name: x[:3] for name, x in batch.items()}, "must all be [2 B, L] for B pairs"),
        ({"completion_mask": batch["completion_mask"] * 0}, "a row of the batch has no completion"),
        ({"input_ids": torch.arange(4).view(4, 1) + batch["input_ids"] * 0}, "no two rows of"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            compare_sharing(model, batch | changes)
    model, pixels = tiny_composite("llava"), torch.zeros(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"holds \['pixel_values'\], but rows are compared by"):
        compare_sharing(model, batch | {"pixel_values": pixels})
    del batch["completion_mask"]
    with pytest.raises(ValueError, match="but no completion_mask; make it by"):
        compare_sharing(model, batch)


def test_models_that_cannot_be_compared():
    model = tiny_model()
    batch = batch_of(model)
    with (
        enable_prefix_sharing(model),
        pytest.raises(RuntimeError, match="shared already, so it cannot run unshared"),
    ):
        compare_sharing(model, batch)
    with pytest.raises(TypeError, match="the string 'gpt2'"):
        compare_sharing("gpt2", batch)
    model = tiny_model(attention="eager", output_attentions=True)
    with pytest.raises(NotImplementedError, match=r"ran unshared: output_attentions; .*; ask for"):
        compare_sharing(model, batch)
    model = tiny_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="log-probs or gradients that are not finite"):
        compare_sharing(model, batch)
    assert patch_of(model.model) is None
    assert all(p.grad is None for p in model.parameters())
