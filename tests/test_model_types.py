"""The page of model types: its machinery tells the statuses apart, and it is in step."""

import dataclasses
import importlib.util
import multiprocessing
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from batches import preference_batch
from sharing_status import (
    BROKEN,
    KINDS,
    LEAST_LEAK,
    NOT_BUILT,
    REFUSED,
    SHARED,
    TOLERANCE,
    VERIFICATION,
    WRONG,
    Status,
    compared,
    status_of,
)
from test_verify import leaking_plan
from tiny_types import MODEL_TYPES, tiny_config, tiny_model_of

from hf_prefix_patch import attention, enable_prefix_sharing, hooks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "models.md").read_text()
FAMILIES = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 olmo3 phi phi3 granite"
FAMILIES += " smollm3 cohere cohere2 mixtral"  # SmolLM and SmolLM2 are of type llama

# Types whose mechanism is a case of its own: a head over `model` instead of its base_model_prefix,
# attention not named so, hidden states of four axes, a head that hands logits_to_keep down,
# attention that is bidirectional among image tokens alone.
SPECIAL = ("mllama", "longcat_flash", "gemma3n_text", "gemma4_text", "gemma4_unified_text")


@pytest.mark.parametrize("model_type", ["llama", *SPECIAL])
def test_shared(model_type):
    status = status_of(model_type)
    assert (status.kind, status.detail) == (SHARED, "")
    assert 0 < status.logps < TOLERANCE
    assert 0 < status.gradients < TOLERANCE
    assert status.leak > LEAST_LEAK


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "attention registry"),
        ("blt", "is not one stack of layers"),
        ("opt", r"has a head that calls \['decoder'\] inside OPTModel"),
        ("roberta", r"counts positions from padding ids \(RobertaEmbeddings\)"),
    ],
)
def test_refused(model_type, reason):
    """Whether or not the model would be verified."""
    status = status_of(model_type)
    assert status.kind == REFUSED
    assert re.search(reason, status.detail)
    with pytest.raises(NotImplementedError, match=reason):
        enable_prefix_sharing(tiny_model_of(model_type), verify=False)


def test_caught_by_verification():
    """Nemotron's layers keep the descriptors from attention."""
    status = status_of("nemotron")
    assert status.kind == VERIFICATION
    assert "does not run on a packed row" in status.detail
    assert status.outcome == "Without verification a call raises RuntimeError."


def test_wrong(monkeypatch):
    changed = dataclasses.replace(attention.BACKENDS["sdpa"], plan=leaking_plan)
    monkeypatch.setitem(attention.BACKENDS, "sdpa", changed)
    status = compared("llama", tiny_model_of("llama"), verify=False)
    assert (status.kind, status.detail) == (WRONG, "results differ")
    assert status.logps > LEAST_LEAK
    assert status.gradients > LEAST_LEAK
    found = status_of("llama")
    assert found.kind == VERIFICATION
    assert found.outcome.startswith("Without verification it is wrong: log-probs differ by ")


def test_wrong_documents(monkeypatch):
    """As if verification had seen apart what is not."""
    assert status_of("llama").documents == "shared"
    assert status_of("afmoe").documents == "as they are"
    monkeypatch.setattr(hooks, "documents_reason", lambda *_: None)
    status = status_of("afmoe")
    assert (status.kind, status.detail) == (WRONG, "documents in one row differ")


def test_a_comparison_that_cannot_fail_is_not_shared():
    """Without attention no row would notice another."""
    model = tiny_model_of("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    status = compared("llama", model)
    assert (status.kind, status.detail) == (WRONG, "the comparison could not have failed")
    assert status.leak < TOLERANCE


def test_what_cannot_be_compared():
    status = status_of("llama", num_attention_heads=3)
    assert status.kind == NOT_BUILT
    assert "not a multiple" in status.detail
    model = tiny_model_of("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    status = compared("llama", model)
    assert (status.kind, status.detail) == (NOT_BUILT, "the unpatched model computes NaN")


@pytest.mark.needs(transformers=">=5.23")
def test_logits_to_keep_of_gemma4():
    """Zero keeps all; otherwise some layers run on the last tokens alone."""
    model, inputs = tiny_model_of("gemma4_text"), preference_batch().inputs
    want = model(**inputs, logits_to_keep=3).logits
    with enable_prefix_sharing(model, on_bypass="ignore") as sharing:
        assert torch.equal(model(**inputs, logits_to_keep=3).logits, want)
        assert sharing.stats.bypassed == {"input 'logits_to_keep'": 1}
        model(**inputs, logits_to_keep=0)
    assert sharing.stats.calls == 1


def test_tiny_configs_have_a_layer_of_every_kind():
    for model_type in ("qwen3_5_text", "bamba", "lfm2", "nemotron_h", "gemma3_text", "jamba"):
        kinds = tiny_config(model_type).layer_types
        assert len(set(kinds)) == len(kinds) > 1, model_type


FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@FORKS
def test_the_command_shows_types_and_leaves_the_page_alone(monkeypatch, capsys):
    """With processes forked off this one; a server of its own would import everything again."""
    module, forked = command(), multiprocessing.get_context("fork")
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: forked)
    monkeypatch.setenv("PYTHONPATH", "")  # which the command adds to
    monkeypatch.setattr(sys, "argv", ["model_types.py", "--jobs", "1", "--types", "bloom,llama"])
    module.main()
    shown = capsys.readouterr().out
    assert "1/2 bloom: refused. does not call its attention through" in shown
    assert "2/2 llama: shared. " in shown
    assert (ROOT / "docs" / "models.md").read_text() == PAGE


def test_the_page_shows_every_status():
    kinds = dict(zip(MODEL_TYPES, KINDS, strict=False))
    page = command().page([Status(name, kind, "X: its; advice") for name, kind in kinds.items()])
    for name, kind in kinds.items():
        assert f"| {kind} | 1 | " in page
        section = page.split(f"## {kind.capitalize()}")[1].split("## ")[0]
        assert f"| {name} | {MODEL_TYPES[name]} |" in section
        assert " its |" in section


def test_types_that_do_not_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model_types.py", "--types", "lama"])
    with pytest.raises(SystemExit):
        command().main()
    assert "['lama'] are no causal-LM types of transformers" in capsys.readouterr().err


@FORKS
@pytest.mark.parametrize(
    ("does", "detail"),
    [
        (lambda *_: os._exit(3), "its process ended with 3"),
        (lambda *_: time.sleep(60), "took more than 0.2 s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_said(monkeypatch, does, detail):
    module = command()
    monkeypatch.setattr(module, "_report", does)
    monkeypatch.setattr(module, "_SECONDS", 0.2 if "took" in detail else 60)
    status = module._isolated(multiprocessing.get_context("fork"), "llama")
    assert (status.kind, status.detail) == (BROKEN, detail)


def command():
    spec = importlib.util.spec_from_file_location("model_types", ROOT / "docs" / "model_types.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_in_step():
    made_with = re.search(
        r"^Made with transformers (\S+), .* hf_prefix_patch (\S+), by", PAGE, re.M
    )
    if made_with[1] != version("transformers"):
        pytest.skip(f"the page is of transformers {made_with[1]}")
    assert made_with[2] == version("hf_prefix_patch")
    tables = PAGE[PAGE.index("## Shared") :]
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (?!class)(\w+) \| ", tables, flags=re.M))
    assert listed == MODEL_TYPES
    counts = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \| ", PAGE, flags=re.M))
    assert sum(map(int, counts.values())) == len(MODEL_TYPES)
    assert counts[WRONG] == counts["not checked"] == "0"
    shared = tables.split("## Refused")[0]
    for family in FAMILIES.split():
        assert f"| {family} | " in shared, family
