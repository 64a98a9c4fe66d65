"""Trainers with our collator, and with batches by token budget."""

import gc
import json
import math
import os
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from batches import LayerTokens, gradients
from families import tiny_model
from tiny_trl import (
    assert_same_log,
    build_trainer,
    load,
    perturb,
    preference_pairs,
    run_dpo,
    tiny_tokenizer,
)
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOTrainer, RewardConfig, RewardTrainer

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharingBatchSampler,
    disable_prefix_sharing,
    enable_prefix_sharing,
    plans,
)
from hf_prefix_patch.callbacks import CheckPolicy, ResumedBatches

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BUDGET = 200  # unique tokens; 12 pairs make three batches
METHODS = (
    "log",
    "compute_loss",
    "training_step",
    "get_train_dataloader",
    "get_total_train_batch_size",
)


class Batches(TrainerCallback):
    """What a trainer counts as it goes along."""

    def __init__(self):
        self.epochs, self.steps = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(state.epoch)
        self.steps.append(state.global_step)


def count_planning(monkeypatch):
    """A call a plan that is made; in the main process, where the batch is collated too."""
    made = []
    original = plans.Plan.of_host_rows
    monkeypatch.setattr(plans.Plan, "of_host_rows", lambda *rows: made.append(1) or original(*rows))
    return made


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("options", [{}, {"max_length": 44}, {"precompute_ref_log_probs": True}])
def test_a_stock_trainer_with_our_collator(llama, tmp_path, monkeypatch, lora, options):
    """The same log, and the model plans nothing itself."""
    options = {"lora": lora, "evaluate": True, **options}
    want = run_dpo(load(llama), tmp_path, **options)
    collator = DataCollatorWithPrefixSharing(0, max_length=options.get("max_length", 1024))
    monkeypatch.setattr(
        "tiny_trl.DPOTrainer", lambda **rest: DPOTrainer(**rest, data_collator=collator)
    )
    plans.forget()
    made = count_planning(monkeypatch)
    got = run_dpo(load(llama), tmp_path, sharing="model", **options)
    assert_same_log(got.log, want.log)
    assert got.trainer.data_collator is collator
    precomputed = 3 + 2 if "precompute_ref_log_probs" in options else 0
    assert len(made) == 3 + 2 + precomputed + 1  # once a batch, and once to verify
    assert not got.handle.stats.bypassed


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_form_plans_in_the_loader(llama, tmp_path, monkeypatch, workers):
    want = run_dpo(load(llama), tmp_path, lora=True, dataloader_num_workers=workers)
    trainer = build_trainer(load(llama), tmp_path, lora=True, dataloader_num_workers=workers)
    before = trainer.data_collator
    handle = enable_prefix_sharing(trainer)
    made = count_planning(monkeypatch)
    trainer.train()
    assert_same_log(trainer.state.log_history, want.log)
    assert len(made) == (0 if workers else 3)
    assert handle.stats.calls == 6
    handle.remove()
    assert trainer.data_collator is before


def epoch_gradients(trainer):
    """Sum of the gradients of all batches of an epoch, no step taken in between."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    pairs = []
    for inputs in trainer.get_train_dataloader():
        pairs.append(len(inputs["input_ids"]) // 2)
        trainer.training_step(trainer.model, inputs)
    return pairs, gradients(trainer.model)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_pair_weighs_the_same(llama, tmp_path, lora, loss):
    """Gradients of an epoch by token budget are those of the same pairs in fixed batches."""
    trainer = build_trainer(load(llama), tmp_path, lora=lora, loss_type=[loss])
    fixed, want = epoch_gradients(trainer)
    assert fixed == [4, 4, 4]
    with enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET) as sharing:
        assert sharing.sampler.pairs_per_batch == 4.0
        pairs, got = epoch_gradients(trainer)
        assert sharing.stats.sharing_ratio > 1.9
    assert sorted(pairs) != fixed
    assert sum(pairs) == 12
    for name, x in want.items():
        assert (got[name] - x).norm() <= 1e-5 * x.norm(), name
    with enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET):
        trainer.compute_loss = type(trainer).compute_loss.__get__(trainer)  # without weights
        _, unweighted = epoch_gradients(trainer)
    assert any((unweighted[name] - x).norm() > 1e-3 * x.norm() for name, x in want.items())


def test_a_training_run(llama, tmp_path):
    """Epochs, steps and samples are counted by the batches of the sampler."""
    callback = Batches()
    trainer = build_trainer(
        load(llama),
        tmp_path,
        lora=True,
        max_steps=-1,
        num_train_epochs=3,
        gradient_accumulation_steps=2,
        dataloader_num_workers=1,
    )
    trainer.add_callback(callback)
    handle = enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET, log_metrics=True)
    assert isinstance(handle.sampler, PrefixSharingBatchSampler)
    seen = LayerTokens(trainer.model)
    trainer.train()
    batches = len(handle.sampler)
    assert batches == 3
    assert trainer.state.global_step == trainer.state.max_steps == 3 * math.ceil(batches / 2)
    assert trainer.state.epoch == 3.0
    assert callback.epochs == pytest.approx([2 / 3, 1, 5 / 3, 2, 8 / 3, 3])
    assert handle.stats.calls == 3 * batches * 2  # policy and reference
    assert max(tokens for _, tokens in seen.shapes) <= BUDGET
    rows = (
        3
        * 2
        * sum(
            2 * len(x["prompt_ids"]) + len(x["chosen_ids"]) + len(x["rejected_ids"])
            for x in trainer.train_dataset
        )
    )
    assert handle.stats.row_tokens == rows  # every pair once an epoch
    assert handle.stats.sharing_ratio > 1.9
    summary = trainer.state.log_history[-1]
    runtime = summary["train_runtime"]
    assert summary["train_samples_per_second"] * runtime == pytest.approx(36, rel=0.01)
    packed = [log["prefix_sharing/packed_tokens"] for log in trainer.state.log_history[:-1]]
    assert sum(packed) == handle.stats.packed_tokens
    losses = [log["loss"] for log in trainer.state.log_history[:-1]]
    assert all(map(math.isfinite, losses))


def test_what_is_logged_has_no_weight(llama, tmp_path):
    """A fresh adapter is its own reference: every batch has the loss log 2, however large."""
    trainer = build_trainer(load(llama), tmp_path, lora=True, learning_rate=0.0)
    for name, x in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(x)
    with enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET):
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx([math.log(2)] * 3, rel=1e-5)


def test_steps_count_samples_by_the_mean_batch(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path, lora=True)  # three steps
    with enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET):
        trainer.train()
    summary = trainer.state.log_history[-1]
    seen = summary["train_samples_per_second"] * summary["train_runtime"]
    assert seen == pytest.approx(12, rel=0.01)


def test_evaluation_keeps_its_batches_and_its_loss(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path, lora=True)
    want = trainer.evaluate()
    with enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET) as sharing:
        got = trainer.evaluate()
        assert sharing.stats.calls == 4
    assert_same_log([got], [want])


def test_resuming_in_the_middle_of_an_epoch(llama, tmp_path):
    """The batches of a resumed run are those that an uninterrupted one had left."""

    def run(output, steps, resume=None):
        trainer = build_trainer(
            load(llama),
            output,
            lora=True,
            max_steps=steps,
            save_strategy="steps",
            save_steps=4,
            learning_rate=0.0,
        )
        handle = enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET)
        order = []
        inner = trainer.data_collator
        trainer.data_collator = lambda examples: order.append(examples) or inner(examples)
        trainer.train(resume_from_checkpoint=resume)
        return order[len(order) - trainer.state.max_steps + (4 if resume else 0) :], handle

    whole, _ = run(tmp_path / "a", 6)
    run(tmp_path / "b", 4)
    rest, _ = run(tmp_path / "b", 6, resume=str(tmp_path / "b" / "checkpoint-4"))
    assert rest == whole[4:]
    assert whole[:3] != whole[3:]  # another order in the second epoch


def test_resuming_with_other_batches_says_so(llama, tmp_path):
    """The trainer skips batches by their number: whose they are, no number tells."""

    def run(tokens, resume=True, **options):
        trainer = build_trainer(
            load(llama), tmp_path, lora=True, max_steps=2, save_strategy="steps", save_steps=1
        )
        trainer.args.ignore_data_skip = options.pop("ignore_data_skip", False)
        with (
            enable_prefix_sharing(trainer, max_tokens_per_batch=tokens, **options),
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resume else None)
        return [str(x.message) for x in said if "the checkpoint was made with" in str(x.message)]

    assert run(BUDGET, resume=False) == []
    assert run(BUDGET) == []
    assert run(2 * BUDGET, ignore_data_skip=True) == []
    run(BUDGET, resume=False)
    (other,) = run(2 * BUDGET)
    assert re.search(f"made with {{.*'max_tokens_per_batch': {BUDGET},.* goes on with {{", other)
    assert re.search(f"goes on with {{.*'max_tokens_per_batch': {2 * BUDGET},.*}}: the ", other)
    run(BUDGET, resume=False)
    assert len(run(BUDGET, sampler_options={"longest_first": True})) == 1
    run(BUDGET, resume=False)
    (none,) = run(None)
    assert "goes on with fixed batches: the trainer skips" in none
    assert run(None, resume=False) == run(None) == []
    (fixed,) = run(BUDGET)
    assert "made with fixed batches, and" in fixed


def test_batches_of_two_processes(llama, tmp_path, monkeypatch):
    """What accelerate deals out is even, disjoint and complete."""
    trainer = build_trainer(load(llama), tmp_path, lora=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "num_processes", 2)
        sampler = enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET).sampler
    shards = []
    for rank in range(2):
        sampler.set_epoch(0)
        shards.append(list(BatchSamplerShard(sampler, 2, rank)))
    assert len(shards[0]) == len(shards[1]) == len(sampler) / 2
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(12))


def test_two_processes(llama, tmp_path):
    """Ranks with different numbers of pairs: the mean loss is that of fixed batches."""
    options = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}
    want = run_dpo(load(llama), tmp_path, lora=True, **options)
    script = Path(__file__).parent / "budget_on_ranks.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher.append("--nproc_per_node=2")
    run = subprocess.run(
        [*launcher, str(script), llama, str(tmp_path), "160"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = re.findall(r'\{"rank".*?\}', run.stdout)
    assert len(lines) == 2, run.stdout + run.stderr
    first, second = sorted(map(json.loads, lines), key=lambda seen: seen["rank"])
    assert first["steps"] == second["steps"] == first["batches"] / 2
    rows = sum(
        2 * len(x["prompt_ids"]) + len(x["chosen_ids"]) + len(x["rejected_ids"])
        for x in want.trainer.train_dataset
    )
    assert first["row_tokens"] != second["row_tokens"]
    assert first["row_tokens"] + second["row_tokens"] == 2 * rows  # policy and reference
    mean = sum(first["losses"] + second["losses"]) / first["batches"]
    assert mean == pytest.approx(want.log[-1]["train_loss"], rel=1e-5)
    assert len(first["margins"]) == first["steps"]


def test_the_epoch_reaches_the_sampler_through_wrappers(llama, tmp_path):
    """In a run resumed on several processes nothing else tells it."""
    trainer = build_trainer(load(llama), tmp_path, lora=True)
    sampler = enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET).sampler
    sampler.set_epoch(2)
    want = list(sampler)[1:]
    sampler.set_epoch(0)
    rest = skip_first_batches(
        DataLoader(range(12), batch_sampler=BatchSamplerShard(sampler, 1, 0), collate_fn=list), 1
    )
    state = SimpleNamespace(epoch=2 - 1e-12)
    trainer.callback_handler.call_event("on_epoch_begin", trainer.args, state, trainer.control)
    assert list(rest) == want


def test_enabling_again_and_taking_it_off(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path, lora=True)
    trainer._set_signature_columns_if_needed()  # of its own accord
    before = dict(trainer.__dict__)
    callbacks = list(trainer.callback_handler.callbacks)

    def changed():
        now = trainer.__dict__
        return {
            name for name in now.keys() | before.keys() if now.get(name) is not before.get(name)
        }

    enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET, log_metrics=True)
    assert changed() == {*METHODS, "data_collator", "_prefix_sharing"}
    handle = enable_prefix_sharing(trainer)  # the later call counts
    assert changed() == {"data_collator", "_prefix_sharing"}
    assert handle.sampler is None
    *others, check, resumed = trainer.callback_handler.callbacks
    assert others == callbacks
    assert isinstance(check, CheckPolicy)
    assert isinstance(resumed, ResumedBatches)
    with pytest.raises(ValueError, match="unique tokens of 12 pairs exceed it") as refused:
        enable_prefix_sharing(trainer, max_tokens_per_batch=5)
    assert 'sampler_options, as {"oversized": "skip"}' in refused.value.__notes__[0]
    assert changed() == {"data_collator", "_prefix_sharing"}
    assert handle.stats is not None
    disable_prefix_sharing(trainer)
    assert changed() == set()
    assert trainer.callback_handler.callbacks == callbacks
    with pytest.raises(ValueError, match="exceed it"):
        enable_prefix_sharing(trainer, max_tokens_per_batch=5)
    assert changed() == set()
    assert not trainer.model.get_base_model().base_model._forward_hooks


def batches_of(trainer):
    return len(trainer.get_train_dataloader())


def test_whoever_removes_takes_the_budget_along(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path, max_steps=1)
    before = set(vars(trainer))
    first = enable_prefix_sharing(trainer, max_tokens_per_batch=2000)
    second = enable_prefix_sharing(trainer, max_tokens_per_batch=2000, verify=False)
    assert batches_of(trainer) == 1
    first.remove()
    assert batches_of(trainer) == 3
    assert vars(trainer).keys() == before | {"_signature_columns"}
    second.remove()
    third = enable_prefix_sharing(trainer, max_tokens_per_batch=2000, verify=False)
    first.remove()  # long off: the newer patch is none of its concern
    assert batches_of(trainer) == 1
    assert third.sampler is not None


@pytest.mark.parametrize("how", ["outer", "disable"])
def test_batches_by_budget_are_never_trained_unshared(llama, tmp_path, how):
    """Sharing was removed from the model, by what knows nothing of the trainer."""
    model = load(llama)
    outer = enable_prefix_sharing(model)
    trainer = build_trainer(model, tmp_path, max_steps=1)
    handle = enable_prefix_sharing(trainer, max_tokens_per_batch=2000)
    outer.remove() if how == "outer" else disable_prefix_sharing(trainer.model)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM .* is not shared: sharing was rem"):
        trainer.train()
    handle.remove()
    assert batches_of(trainer) == 3
    trainer.train()


@pytest.mark.parametrize("on_bypass", ["warn", "raise", "ignore"])
def test_a_model_that_takes_the_place_of_the_shared_one(llama, tmp_path, on_bypass, recwarn):
    def make(shared=False):
        model = LlamaForSequenceClassification.from_pretrained(llama, num_labels=1)
        model.config.pad_token_id = 0
        return enable_prefix_sharing(model, verify=False) and model if shared else model

    def train(**options):
        args = TrainingArguments(
            tmp_path, max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False
        )
        rows = [{"input_ids": [1, 2, 3, 4 + i], "labels": 0.0} for i in range(4)]
        trainer = Trainer(
            model_init=lambda: make(shared=len(made) > 0 and again),
            args=args,
            train_dataset=rows,
            data_collator=lambda x: {k: torch.tensor([y[k] for y in x]) for k in x[0]},
        )
        made.append(1)
        handle = enable_prefix_sharing(trainer, on_bypass=on_bypass)
        trainer.train()
        assert handle.stats.calls == 0  # of the model that is gone
        return trainer

    made, again = [], False
    if on_bypass == "raise":
        with pytest.raises(RuntimeError, match="as what model_init builds does"):
            train()
    else:
        train()
    said = [str(x.message) for x in recwarn if "is not shared" in str(x.message)]
    assert len(said) == (on_bypass == "warn")
    made, again = [], True
    trainer = train()  # says nothing
    assert trainer.model.model._prefix_sharing.stats.calls == 1
    assert len([x for x in recwarn if "is not shared" in str(x.message)]) == len(said)


def test_an_inner_context_gives_the_trainer_back(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path, max_steps=1, logging_steps=1)
    with enable_prefix_sharing(trainer, max_tokens_per_batch=2000, log_metrics=True) as outer:
        ours = dict(vars(trainer))
        with enable_prefix_sharing(trainer, verify=False) as inner:
            assert inner.sampler is None
            assert batches_of(trainer) == 3
        assert {name: vars(trainer)[name] for name in ours} == ours
        assert batches_of(trainer) == 1
        trainer.train()
        assert "prefix_sharing/sharing_ratio" in trainer.state.log_history[0]
        assert outer.stats.calls > 0
    assert batches_of(trainer) == 3
    assert len(outer.sampler) == 1  # as it was


@pytest.mark.parametrize("disabled", [True, False])
def test_a_handle_keeps_no_trainer_alive(llama, tmp_path, disabled):
    """Its counters are read when the trainer and its models are gone."""
    trainer = build_trainer(load(llama), tmp_path, max_steps=1)
    handle = enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET, log_metrics=True)
    trainer.train()
    if disabled:
        disable_prefix_sharing(trainer)
    alive = [weakref.ref(x) for x in (trainer, trainer.model, trainer.ref_model)]
    del trainer
    gc.collect()
    assert [part() for part in alive] == [None] * 3
    assert handle.stats.calls == 2
    assert len(handle.sampler) > 1
    handle.remove()


def test_what_is_set_while_sharing_is_on_stays(llama, tmp_path):
    """A collator of the user's, and a loss around the weighted one, which weighs no more."""
    trainer = build_trainer(load(llama), tmp_path, per_device_train_batch_size=3)
    with enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET):
        collator = trainer.data_collator = DataCollatorWithPrefixSharing(0, max_length=44)
        inner = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: inner(*args, **kwargs)
    assert trainer.data_collator is collator
    pairs, got = epoch_gradients(trainer)
    assert pairs == [3] * 4  # other than the mean of the budget's batches, or they weighed 1 anyway
    del trainer.compute_loss
    _, want = epoch_gradients(trainer)
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_options_of_the_sampler(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path, lora=True)
    options = {"oversized": "skip", "longest_first": True}
    with pytest.warns(UserWarning, match="they are left out"):
        handle = enable_prefix_sharing(
            trainer, max_tokens_per_batch=50, sampler_options=options, verify=False
        )
    sampler = handle.sampler
    assert 0 < len(sampler.skipped) < 12
    sizes = [sampler.unique_tokens(batch) for batch in sampler]
    assert sizes[0] == max(sizes) <= 50


def _subclass(trainer):
    class Own(type(trainer)):
        def get_train_dataloader(self):
            return super().get_train_dataloader()

    trainer.__class__ = Own
    return trainer


def _other_rows(trainer):
    """A collator that makes other rows than its columns say."""
    inner = trainer.data_collator

    def collator(examples):
        more = [x | {"chosen_ids": x["chosen_ids"] + [7, 8, 9]} for x in examples]
        return inner(more)

    trainer.data_collator = collator
    return trainer


def _without_rows(trainer):
    trainer.data_collator = lambda examples: {"text": torch.zeros(len(examples), 2)}
    return trainer


def _with(trainer, name, value):
    setattr(trainer.args, name, value)
    return trainer


def _dispatching(trainer):
    trainer.accelerator.dataloader_config.dispatch_batches = True
    return trainer


def _without_data(trainer):
    trainer.train_dataset = None
    return trainer


BAD = {
    "a model": (
        lambda trainer: trainer.model,
        {"max_tokens_per_batch": 9},
        r"max_tokens_per_batch=9 needs a trainer, but target is a PeftModel",
    ),
    "sampling": (
        lambda trainer: _with(trainer, "train_sampling_strategy", "group_by_length"),
        {"max_tokens_per_batch": 99},
        r"train_sampling_strategy='group_by_length'",
    ),
    "dispatch": (
        lambda trainer: _dispatching(trainer),
        {"max_tokens_per_batch": 99},
        "dispatch_batches and split_batches cannot deal out",
    ),
    "batch size": (
        lambda trainer: _with(trainer, "auto_find_batch_size", True),
        {"max_tokens_per_batch": 99},
        "auto_find_batch_size would",
    ),
    "own batches": (
        _subclass,
        {"max_tokens_per_batch": 99},
        "so does Own, which has a get_train_dataloader of its own",
    ),
    "other rows": (
        _other_rows,
        {"max_tokens_per_batch": 99},
        "DPOTrainer makes other rows than .* leave it out, sharing serves",
    ),
    "no rows": (
        _without_rows,
        {"max_tokens_per_batch": 99},
        r"batches of \['text'\], but max_tokens_per_batch needs rows of input_ids",
    ),
    "no data": (
        lambda trainer: _without_data(trainer),
        {"max_tokens_per_batch": 99},
        "needs a trainer with a train_dataset",
    ),
}


@pytest.mark.parametrize(("target", "options", "message"), BAD.values(), ids=BAD)
def test_bad_options(llama, tmp_path, target, options, message):
    trainer = build_trainer(load(llama), tmp_path, lora=True)
    with pytest.raises(ValueError, match=message):
        enable_prefix_sharing(target(trainer), **options)
    assert "compute_loss" not in vars(trainer)


def test_a_stream_has_no_batches_to_choose(llama, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(preference_pairs())

    trainer = build_trainer(load(llama), tmp_path, lora=True)
    trainer.train_dataset = Stream()
    with pytest.raises(TypeError, match=r"data is a Stream, but .* need a sequence of examples"):
        enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET)


class MeanLoss(Trainer):
    """A plain trainer: the mean over rows of the mean loss over their tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        real = inputs["attention_mask"][:, 1:].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none"
        )
        loss = ((losses * real).sum(1) / real.sum(1)).mean()
        return (loss, {"loss": loss}) if return_outputs else loss


def rows_collator(examples):
    length = max(len(x["input_ids"]) for x in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, x in enumerate(examples):
        ids[i, : len(x["input_ids"])] = torch.tensor(x["input_ids"])
        mask[i, : len(x["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask}


def plain_trainer(tmp_path, kind=MeanLoss, model=None, **options):
    """Twelve rows, four of each of three prompts."""
    data = [
        {"input_ids": [p] * 5 + list(range(20, 21 + i % 4)) + [p]}
        for i in range(12)
        for p in [5 + i % 3]
    ]
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=3,
        **options,
    )
    return kind(model or tiny_model(), args, data_collator=rows_collator, train_dataset=data)


def test_batches_are_counted_as_they_are_made(tmp_path):
    """A collator that goes on making other rows than it did when it was looked at."""
    trainer = plain_trainer(tmp_path)
    left = []

    def collator(examples):
        return (padded_on_the_left if left else rows_collator)(examples)

    trainer.data_collator = collator
    with enable_prefix_sharing(trainer, max_tokens_per_batch=26):
        left.append(True)
        with pytest.raises(ValueError, match=r"unique tokens, more than max_tokens_per_batch=26"):
            trainer.train()


@pytest.mark.parametrize("longest", range(3, 12))
def test_the_longest_row_is_looked_at(tmp_path, longest):
    """In whichever batch it comes."""
    trainer = plain_trainer(tmp_path)
    trainer.train_dataset[longest]["input_ids"] += [9] * 4
    most = len(trainer.train_dataset[longest]["input_ids"])
    trainer.data_collator = lambda examples: rows_collator(
        [x | {"input_ids": x["input_ids"][: most - 1]} for x in examples]
    )
    with pytest.raises(ValueError, match=rf"{most - 1}, .* unique tokens .* {most}, "):
        enable_prefix_sharing(trainer, max_tokens_per_batch=40)


def padded_on_the_left(examples):
    batch = rows_collator(examples)
    shifts = (batch["attention_mask"] == 0).sum(1)
    return {
        name: torch.stack([row.roll(n.item()) for row, n in zip(x, shifts, strict=True)])
        for name, x in batch.items()
    }


@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
@pytest.mark.parametrize("side", ["right", "left"])
def test_length_to_pad_to(tmp_path, side):
    """`max_length` of a collator that pads cuts nothing; what it pads on the left is refused."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    trainer = plain_trainer(tmp_path)
    longest = max(len(x["input_ids"]) for x in trainer.train_dataset)
    trainer.data_collator = DataCollatorWithPadding(tokenizer, max_length=longest - 2)
    if side == "left":
        with pytest.raises(ValueError, match=r"are counted, padded on the right"):
            enable_prefix_sharing(trainer, max_tokens_per_batch=26)
        return
    with enable_prefix_sharing(trainer, max_tokens_per_batch=26) as sharing:
        want = {"epoch": 0, "batches": 0, "batches_per_epoch": len(sharing.sampler)}
        assert sharing.sampler.state_dict() == want
        counted = [sharing.sampler.unique_tokens(batch) for batch in sharing.sampler]
        sharing.sampler.set_epoch(0)
        seen = LayerTokens(trainer.model)
        trainer.train()
    assert [n for _, n in seen.shapes][: len(counted)] == counted


def test_transformers_trainer(tmp_path):
    trainer = plain_trainer(tmp_path)
    trainer.current_gradient_accumulation_steps = 1

    def epoch():
        trainer.model.zero_grad()
        rows = []
        for inputs in trainer.get_train_dataloader():
            rows.append(len(inputs["input_ids"]))
            trainer.training_step(trainer.model, inputs)
        return rows, gradients(trainer.model)

    fixed, want = epoch()
    assert fixed == [4, 4, 4]
    with enable_prefix_sharing(trainer, max_tokens_per_batch=26) as sharing:
        rows, got = epoch()
        scale = 4 / sharing.sampler.pairs_per_batch
        assert sharing.stats.sharing_ratio > 2
        trainer.train()
    assert len(set(rows)) > 1
    for name, x in want.items():
        assert (got[name] - scale * x).norm() <= 1e-5 * scale * x.norm(), name


def test_losses_by_tokens_are_left_alone(tmp_path):
    """transformers divides these by the number of targets in the step itself."""

    def with_labels(examples):
        batch = rows_collator(examples)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch | {"labels": labels}

    trainer = plain_trainer(tmp_path, Trainer)
    trainer.data_collator = with_labels
    with enable_prefix_sharing(trainer, max_tokens_per_batch=26) as sharing:
        inputs = trainer.data_collator([trainer.train_dataset[0]])
        trainer.get_train_dataloader()  # before, batches are not of the budget
        trainer.model.train()
        one = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=4)
        assert one == type(trainer).compute_loss(
            trainer, trainer.model, inputs, num_items_in_batch=4
        )
        weighted = trainer.compute_loss(trainer.model, inputs)
        plain = type(trainer).compute_loss(trainer, trainer.model, inputs)
        assert weighted.item() == pytest.approx(plain.item() / sharing.sampler.pairs_per_batch)
        trainer.train()


TARGETS = {
    "regression": (1, lambda i: i / 4),
    "single_label_classification": (3, lambda i: i % 3),
    "multi_label_classification": (3, lambda i: [i % 2, 1.0, 0.0]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_one_target_a_row(tmp_path, kind):
    """As many targets as rows are counted in a step; not all of these losses are divided by it."""
    classes, target = TARGETS[kind]
    config = tiny_model().config
    config.num_labels, config.problem_type, config.pad_token_id = classes, kind, 0
    trainer = plain_trainer(tmp_path, Trainer, model=LlamaForSequenceClassification(config))
    trainer.train_dataset = [x | {"labels": target(i)} for i, x in enumerate(trainer.train_dataset)]

    def collator(examples):
        labels = torch.tensor([x["labels"] for x in examples])
        return rows_collator(examples) | {"labels": labels}

    trainer.data_collator = collator
    trainer.current_gradient_accumulation_steps = 2

    def epoch():
        trainer.model.zero_grad()
        losses = []
        for inputs in trainer.get_train_dataloader():
            rows = len(inputs["input_ids"])
            loss = trainer.training_step(trainer.model, inputs, 2 * rows)
            losses.append((rows, loss.item()))
        return losses, gradients(trainer.model)

    with enable_prefix_sharing(trainer):
        trainer.model_accepts_loss_kwargs = False  # means over rows
        fixed, want = epoch()
        trainer.model_accepts_loss_kwargs = True
    with enable_prefix_sharing(trainer, max_tokens_per_batch=26) as sharing:
        found, got = epoch()
        scale = 4 / sharing.sampler.pairs_per_batch
        trainer.train()
    assert len({rows for rows, _ in found}) > 1
    total = sum(rows * loss for rows, loss in fixed)
    assert sum(rows * loss for rows, loss in found) == pytest.approx(total, rel=1e-5)
    for name, x in want.items():
        assert (got[name] - scale * x).norm() <= 1e-5 * scale * x.norm(), name


def with_targets(examples):
    batch = rows_collator(examples)
    return batch | {"labels": batch["input_ids"]}


@pytest.mark.needs(transformers=">=5")  # before, models that take the number are told so apart
def test_means_over_pairs_that_are_handed_a_number_of_targets(tmp_path):
    """A loss of the user's own that is not divided by it: said, once, with what to do."""

    def train(accepts):
        trainer = plain_trainer(tmp_path, WithLabels)
        trainer.data_collator = with_targets
        trainer.model_accepts_loss_kwargs = accepts
        enable_prefix_sharing(trainer, max_tokens_per_batch=26)
        trainer.train()

    with pytest.warns(UserWarning, match=r"hands num_items_in_batch to compute_loss of") as caught:
        train(accepts=True)
    assert len([x for x in caught if "model_accepts_loss_kwargs = False" in str(x.message)]) == 1
    train(accepts=False)  # warnings are errors


class MeanOfRows(torch.nn.Module):
    """Takes whatever a trainer passes, and returns a mean over rows all the same."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, **unused):
        loss = MeanLoss.compute_loss(
            None, self.model, {"input_ids": input_ids, "attention_mask": attention_mask}
        )
        return {"loss": loss}


@pytest.mark.needs(transformers=">=5")
def test_a_module_that_is_handed_a_number_of_targets(tmp_path):
    def train(accepts):
        stock = plain_trainer(tmp_path, Trainer)
        trainer = Trainer(
            MeanOfRows(stock.model), stock.args, with_targets, train_dataset=stock.train_dataset
        )
        assert trainer.model_accepts_loss_kwargs
        trainer.model_accepts_loss_kwargs = accepts
        enable_prefix_sharing(trainer, max_tokens_per_batch=26)
        trainer.train()

    with pytest.warns(UserWarning, match=r"hands num_items_in_batch to forward of test_budget"):
        train(accepts=True)
    train(accepts=False)  # warnings are errors


@pytest.mark.needs(transformers=">=5")
def test_a_loss_function_that_is_handed_a_number_of_targets(tmp_path):
    """It keeps the number, one target a row or not, as it may well divide by it."""
    handed = []

    def loss(outputs, labels, num_items_in_batch):
        handed.append(num_items_in_batch.item())
        return outputs.logits.sum(dim=(1, 2)).mean()

    trainer = plain_trainer(tmp_path, Trainer)
    trainer.data_collator = lambda examples: (
        with_targets(examples) | {"labels": torch.zeros(len(examples))}
    )
    trainer.compute_loss_func = loss
    enable_prefix_sharing(trainer, max_tokens_per_batch=26)
    with pytest.warns(UserWarning, match=r"hands num_items_in_batch to compute_loss_func of test_"):
        trainer.train()
    assert len(handed) == 3


class WithLabels(MeanLoss):
    def compute_loss(self, model, inputs, *args, **options):
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return super().compute_loss(model, rows, *args, **options)


class At(TrainerCallback):
    """Does something at an event of a training run, once."""

    def __init__(self, event, action):
        def run(*args, **kwargs):
            if self._action is not None:
                action, self._action = self._action, None
                action()

        self._action = action
        setattr(self, event, run)


@pytest.mark.parametrize("budget", [None, 2000])
def test_sharing_that_a_callback_takes_off(llama, tmp_path, budget):
    """Callbacks after it miss no event; of batches by budget, which stay, is said what they are."""
    trainer = build_trainer(load(llama), tmp_path, max_steps=3)
    enable_prefix_sharing(trainer, max_tokens_per_batch=budget)
    trainer.add_callback(At("on_step_end", lambda: disable_prefix_sharing(trainer)))
    counting = Batches()
    trainer.add_callback(counting)
    if budget is None:
        trainer.train()
    else:
        with pytest.warns(UserWarning, match="was removed from a trainer that is training: until"):
            trainer.train()
    assert counting.steps == [1, 2, 3]


def test_a_model_that_stops_sharing_in_the_middle(llama, tmp_path):
    """Batches by budget are trained shared to the last step."""
    trainer = build_trainer(load(llama), tmp_path, max_steps=3)
    enable_prefix_sharing(trainer, max_tokens_per_batch=2000)
    trainer.add_callback(At("on_step_end", lambda: disable_prefix_sharing(trainer.model)))
    counting = Batches()
    trainer.add_callback(counting)
    with pytest.raises(RuntimeError, match=r"is not shared.* made by max_tokens_per_batch"):
        trainer.train()
    assert counting.steps == [1]


def test_a_failed_run_says_nothing_more(llama, tmp_path):
    """Sharing comes off on the way out, with its error alone."""

    def fail():
        raise ValueError("out of patience")

    trainer = build_trainer(load(llama), tmp_path, max_steps=2)
    trainer.add_callback(At("on_step_end", fail))
    sharing = enable_prefix_sharing(trainer, max_tokens_per_batch=2000)
    with pytest.raises(ValueError, match="out of patience"):
        trainer.train()
    sharing.remove()  # warnings are errors


def test_a_budget_that_comes_after_the_batches(llama, tmp_path):
    """Enabled when training has begun: the trainer's own batches, and their own weight."""
    trainer = build_trainer(load(llama), tmp_path, max_steps=1, per_device_train_batch_size=3)
    weights = []

    def enable():
        handle = enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET)
        budget = trainer.__dict__["_prefix_sharing"].budget
        plain, weighted = budget._compute_loss, trainer.compute_loss

        def compare(*args, **kwargs):
            weights.append((weighted(*args, **kwargs) / plain(*args, **kwargs)).item())
            return plain(*args, **kwargs)

        trainer.compute_loss = compare
        assert handle.sampler.pairs_per_batch == 4

    trainer.add_callback(At("on_train_begin", enable))
    trainer.train()
    assert weights == [pytest.approx(1.0)]


def test_a_data_set_that_takes_the_place_of_another(llama, tmp_path):
    """As in iterative DPO: all of its pairs are trained on, within the budget."""
    trainer = build_trainer(load(llama), tmp_path, max_steps=3)
    whole = trainer.train_dataset
    trainer.train_dataset = whole.select(range(5))
    with enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET) as sharing:
        assert sum(len(x["input_ids"]) // 2 for x in trainer.get_train_dataloader()) == 5
        trainer.train_dataset = whole
        batches = list(trainer.get_train_dataloader())
        assert sum(len(x["input_ids"]) // 2 for x in batches) == len(whole)
        assert all(x["input_ids"].prefix_tree.packed_tokens <= BUDGET for x in batches)
        assert len(batches) == len(sharing.sampler)
        tokens = sharing.sampler.unique_tokens(range(len(whole)))
        trainer.data_collator.max_length = 20
        trainer.train_dataset = whole.select([])
        for _ in range(2):  # what cannot be counted is never trained by the batches of another
            with pytest.raises(ValueError, match="data has no examples"):
                trainer.get_train_dataloader()
        trainer.train_dataset = whole.select(range(4))
        other = trainer.data_collator
        trainer.data_collator = lambda examples: {"text": examples}
        trainer.data_collator.max_length = 20
        with pytest.raises(ValueError, match="needs rows of input_ids to count"):
            trainer.get_train_dataloader()
        trainer.train_dataset, trainer.data_collator = whole, other
        batches = list(trainer.get_train_dataloader())
        assert sum(len(x["input_ids"]) // 2 for x in batches) == len(whole)
        assert sharing.sampler.unique_tokens(range(len(whole))) < tokens


def test_reward_trainer(llama, tmp_path):
    model = LlamaForSequenceClassification.from_pretrained(llama, num_labels=1)
    perturb(model)
    config = RewardConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=preference_pairs(),
        processing_class=tiny_tokenizer(),
    )
    fixed, want = epoch_gradients(trainer)
    assert fixed == [4, 4, 4]
    with enable_prefix_sharing(trainer, max_tokens_per_batch=BUDGET) as sharing:
        pairs, got = epoch_gradients(trainer)
        scale = 4 / sharing.sampler.pairs_per_batch
        assert sharing.stats.sharing_ratio > 1.5
    assert sum(pairs) == 12
    for name, x in want.items():
        assert (got[name] - scale * x).norm() <= 1e-5 * scale * x.norm(), name
    trainer.data_collator = DataCollatorWithPrefixSharing(pad_token_id=0)
    with pytest.raises(ValueError, match=r"RewardTrainer is a .* takes margins, .* data_collator"):
        enable_prefix_sharing(trainer)
