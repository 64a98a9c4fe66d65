"""The examples run on a tiny model and data of one's own."""

import importlib
import json
import re
import runpy
import sys
from math import log
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from tiny_trl import load, lora_config, perturb, preference_pairs, save_tiny_model, tiny_tokenizer
from torch.nn.functional import softplus
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharingBatchSampler,
    enable_prefix_sharing,
    tokenize_preferences,
)

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """Run a script of examples/ with a tiny model, in its own folder."""
    model = save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, "--model", model, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    return run


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, preference_pairs())))
    return path


@pytest.fixture
def seen():
    """The `[rows, tokens]` that the first decoder layer of any model is called with, in order; not
    when checkpointed layers run again, for which transformers 5.17 calls their hooks too."""
    shapes = []

    def note(module, args):
        if torch._C._current_graph_task_id() != -1:  # in backward
            return
        if type(module).__name__ == "LlamaDecoderLayer" and module.self_attn.layer_idx == 0:
            shapes.append(tuple(args[0].shape[:2]))

    hook = register_module_forward_pre_hook(note)
    yield shapes
    hook.remove()


def tokenized(data):
    return tokenize_preferences(data, tiny_tokenizer(), progress=False)


def plain_losses(model, pairs, beta):
    """DPO losses of an unpatched PEFT model, row by row."""

    def logps(prompt, completion):
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    losses = []
    for pair in pairs:
        rows = [(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids")]
        with torch.no_grad(), model.disable_adapter():
            reference = [logps(*row) for row in rows]
        chosen, rejected = (logps(*row) - ref for row, ref in zip(rows, reference, strict=True))
        losses.append(softplus(-beta * (chosen - rejected)))
    return torch.stack(losses)


def grads(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def assert_adapter_saved(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as saved:
        assert any("lora_A" in name for name in saved.keys())  # noqa: SIM118


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["jsonl", "datasets"])
def test_trl_dpo_lora(run_example, data, tmp_path, capsys, form):
    if form == "datasets":
        data = tmp_path / "pairs"
        preference_pairs().save_to_disk(data)
    run_example("trl_dpo_lora.py", "--data", data, "--steps", 2, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "adapter saved to" in said
    assert "4 calls; bypassed: none" in said  # policy and reference, two steps
    assert_adapter_saved(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_trl_packed(run_example, data, tmp_path, capsys, seen):
    """The decoder runs on the unique tokens of the batches that the sampler makes."""
    budget = 150
    run_example(
        *("trl_packed.py", "--data", data, "--steps", 3, "--max-tokens", budget),
        *("--output", tmp_path / "out"),
    )
    said = capsys.readouterr().out
    sampler = PrefixSharingBatchSampler(tokenized(data), budget, seed=42)  # the trainer's seed
    tokens = [sampler.unique_tokens(batch) for batch in sampler][:3]
    assert seen[-6:] == [(1, n) for n in tokens for _ in ("policy", "reference")]
    assert f"batches per epoch: {len(sampler)}, 6 without" in said
    assert f"pairs per batch: {sampler.pairs_per_batch:.1f} on average, 2 without" in said
    assert f"{2 * sum(tokens):,} tokens computed in place of" in said
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.einfa]+)", said)]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert_adapter_saved(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_plain_pytorch_dpo(run_example, data, tmp_path, capsys, seen):
    """All pairs in one batch: the loss falls from log 2 at every step."""
    run_example(
        *("plain_pytorch_dpo.py", "--data", data, "--epochs", 3, "--max-tokens", 10_000),
        *("--lr", 1e-2, "--output", tmp_path / "out"),
    )
    said = capsys.readouterr()
    # The bar shows each more than once.
    losses = list(dict.fromkeys(map(float, re.findall(r"loss ([\d.]+)", said.err))))
    assert len(losses) == 3
    assert losses[0] == pytest.approx(log(2), abs=1e-4)
    assert losses == sorted(losses, reverse=True)
    rows = [p["prompt_ids"] + p[x] for p in tokenized(data) for x in ("chosen_ids", "rejected_ids")]
    unique = len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})
    assert seen[-6:] == [(1, unique)] * 6
    assert f"{6 * unique:,} tokens computed in place of" in said.out
    assert_adapter_saved(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_plain_pytorch_dpo_weighs_pairs_the_same(run_example, data, tmp_path, monkeypatch):
    """Over an epoch without a change of weights, gradients add up to those of all pairs at once."""
    steps = []

    class Recorder(torch.optim.AdamW):
        def step(self):
            steps.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    budget = 150
    run_example(
        *("plain_pytorch_dpo.py", "--data", data, "--max-tokens", budget),
        *("--output", tmp_path / "out"),
    )
    pairs = tokenized(data)
    sampler = PrefixSharingBatchSampler(pairs, budget)
    assert len({len(batch) for batch in sampler}) > 1
    assert len(steps) == len(sampler)
    model = load(str(tmp_path / "model"))
    model = PeftModel.from_pretrained(model, tmp_path / "out", is_trainable=True)
    loss = plain_losses(model, pairs, beta=0.1).sum() / sampler.pairs_per_batch
    for got, want in zip(zip(*steps, strict=True), grads(loss, model), strict=True):
        torch.testing.assert_close(sum(got), want)


def test_plain_pytorch_dpo_loss(data, tmp_path, monkeypatch):
    """Losses and gradients of an adapter that has moved, against one unshared row after another."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    dpo_loss = importlib.import_module("plain_pytorch_dpo").dpo_loss
    model = get_peft_model(load(save_tiny_model(tmp_path / "model")), lora_config()).train()
    perturb(model, 0.3)
    pairs = tokenized(data)
    want = plain_losses(model, pairs, beta=0.5)
    assert want.std() > 0.1
    batch = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")(pairs)
    with enable_prefix_sharing(model):
        got = dpo_loss(model, batch, beta=0.5)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads(got.mean(), model), grads(want.mean(), model))


def test_plain_pytorch_dpo_is_short():
    source = (EXAMPLES / "plain_pytorch_dpo.py").read_text()
    assert len(source.splitlines()) <= 80
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE))
    assert {"torch", "hf_prefix_patch"} <= imported
    assert not {"trl", "datasets"} & imported


@pytest.mark.filterwarnings("ignore")
def test_demo(run_example, data, tmp_path, capsys):
    """Table, chart, adapter and answer; the losses of the two runs are the same."""
    run_example("demo.py", "--data", data, "--steps", 3, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    lines = said.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ["step"])
    table = lines[header + 1 : header + 5]
    for line in table[:3]:
        _, plain, shared, tokens, packed, *_ = line.split()
        assert float(plain) == pytest.approx(float(shared), abs=1e-5)
        assert int(packed) < 0.75 * int(tokens)
    assert table[3].split()[0] == "all"
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "patched" / "adapter_model.safetensors").exists()
    assert "answer:" in said
