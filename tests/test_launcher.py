"""The launcher: models and trainers of a script that knows nothing of it."""

import copy
import importlib
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import trl
from batches import assert_same_run, preference_batch, run
from families import tiny_model
from launched_script import both
from peft import LoraConfig, get_peft_model
from tiny_trl import (
    assert_same_log,
    assert_same_reference,
    build_trainer,
    load,
    load_moved,
    perturb,
    preference_pairs,
    tiny_tokenizer,
)
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import DPOTrainer
from trl.scripts import dpo

import hf_prefix_patch
from hf_prefix_patch import (
    disable_prefix_sharing,
    enable_prefix_sharing,
)
from hf_prefix_patch.cli import main
from hf_prefix_patch.collator import PlanningCollator
from hf_prefix_patch.hooks import patch_of
from hf_prefix_patch.launch import verify_before_first_call
from hf_prefix_patch.switch import LaunchOptions, switch_on, switch_that_is_on
from hf_prefix_patch.trainer import trainer_patch_of
from hf_prefix_patch.wrappers import device_of

# TRL and transformers announce renamed and deprecated options; what they are is no concern here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROOT = Path(__file__).parents[1]
by_method = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, **sizes))
    path = tmp_path_factory.mktemp("bert")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def launched():
    """Switches on in this process, as the command does before it runs a script."""
    switches = []

    def start(**options):
        switches.append(switch_on(LaunchOptions(**options)))
        return switches[-1]

    yield start
    for switch in switches:
        switch.off()


def summary(switch, capsys):
    capsys.readouterr()
    switch.launch().report()
    return capsys.readouterr().err.splitlines()


def stats_of(model):
    return patch_of(model.base_model).stats


def waits(model):
    """Whether it will be verified at its first call."""
    return patch_of(model.base_model).before_first_call is verify_before_first_call


def rows(**options):
    return preference_batch(**options).inputs | {"use_cache": False}


# Models that come through from_pretrained.


@by_method
def test_path_as_model_and_precomputed_reference(launched, llama, tmp_path, capsys, lora):
    """The pass inside the trainer's constructor is shared, and nothing says that it was not."""
    options = {"lora": lora, "precompute_ref_log_probs": True}
    want = build_trainer(llama, tmp_path, **options)
    switch = launched()
    got = build_trainer(llama, tmp_path, **options)
    policy = got.model.get_base_model() if lora else got.model
    assert stats_of(policy).calls == 3 + 2  # batches of the training and the evaluation pairs
    assert_same_reference(got, want)
    want.train()
    got.train()
    assert_same_log(got.state.log_history, want.state.log_history)
    stats = stats_of(policy)
    assert stats.calls == 5 + 3
    assert stats.packed_tokens < 0.75 * stats.row_tokens
    assert str(stats).endswith(", 8 calls; bypassed: none")
    (line,) = summary(switch, capsys)
    name = f"LlamaForCausalLM from '{llama}' (policy of DPOTrainer)"
    assert line == f"prefix sharing: {name}: {stats}"


def test_reference_model_that_the_trainer_loads(launched, llama, tmp_path, capsys):
    want = build_trainer(llama, tmp_path)
    switch = launched()
    got = build_trainer(llama, tmp_path)
    for trainer in (want, got):
        trainer.train()
    assert_same_log(got.state.log_history, want.state.log_history)
    assert [stats_of(model).calls for model in (got.model, got.ref_model)] == [3, 3]
    policy, reference = summary(switch, capsys)
    assert "(policy of DPOTrainer)" in policy
    assert "(reference of DPOTrainer)" in reference


def test_second_reference_model_computes_before_the_trainer_is_built(launched, llama, tmp_path):
    options = {"precompute_ref_log_probs": True}
    want = build_trainer(llama, tmp_path, ref_model=load_moved(llama), **options)
    launched()
    got = build_trainer(llama, tmp_path, ref_model=load_moved(llama), **options)
    assert [stats_of(model).calls for model in (got.model, got.ref_model)] == [0, 5]
    ours, theirs = (torch.tensor(list(t.train_dataset["ref_rejected_logps"])) for t in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


def test_model_in_a_loop_of_ones_own(launched, llama):
    """Verified at its first call, which is shared itself; forward and gradients are the same."""
    theirs = load(llama).train()
    launched()
    ours = load(llama).train()
    assert waits(ours)
    batch = rows()
    for model in (theirs, ours):
        model(**batch).logits[batch["attention_mask"].bool()].square().mean().backward()
    assert not waits(ours)
    stats = stats_of(ours)
    assert (stats.calls, stats.row_tokens) == (1, batch["attention_mask"].sum())
    assert stats.packed_tokens < stats.row_tokens
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_classifier_is_shared_in_evaluation_after_its_verification_too(launched, llama):
    """Nobody goes on from its cache; its head shows that, which the hook does not see."""
    launched()
    model = LlamaForSequenceClassification.from_pretrained(llama, num_labels=1).eval()
    for _ in range(2):
        model(input_ids=rows()["input_ids"])
    assert (stats_of(model).calls, stats_of(model).bypassed) == (2, {})


def test_loading_info_comes_back(launched, llama):
    launched()
    model, info = transformers.LlamaForCausalLM.from_pretrained(llama, output_loading_info=True)
    assert patch_of(model.base_model) is not None
    assert info["missing_keys"] == set()


def test_model_that_fails_its_verification_runs_unshared(launched, llama, capsys):
    """Something beside attention looks across the tokens of a row."""

    def broken():
        model = load(llama)
        mix = model.base_model.layers[0].mlp
        mix.register_forward_hook(lambda module, args, output: output + output.cumsum(1))
        return model

    batch = rows()
    want = broken()(**batch).logits
    switch = launched()
    model = broken()
    with pytest.warns(UserWarning, match="LlamaModel runs without prefix sharing: .* differ"):
        got = model(**batch).logits
    assert patch_of(model.base_model) is None
    assert torch.equal(got, want)
    assert torch.equal(model(**batch).logits, want)
    told = "no call shared; bypassed: verification of prefix sharing failed"
    assert told in summary(switch, capsys)[0]


def test_without_verification(launched, llama):
    launched(verify=False)
    model = load(llama)
    assert not waits(model)
    model(**rows())
    assert stats_of(model).calls == 1


def test_copies_and_pickles_of_a_loaded_model(launched, llama):
    """Before its first call: each verifies and shares its own weights."""
    launched()
    model = load(llama)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    batch = rows()
    for other in others:
        perturb(other)
        shared = other(**batch).logits
        assert stats_of(other).calls == 1
        disable_prefix_sharing(other)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(shared[real], other(**batch).logits[real])
    assert stats_of(model).calls == 0


def test_script_that_switches_sharing_off_itself(launched, llama):
    want = load(llama)(**rows()).logits
    launched()
    model = load(llama)
    disable_prefix_sharing(model)
    assert torch.equal(model(**rows()).logits, want)
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("verify", [True, False])
def test_script_that_switches_sharing_on_itself(launched, llama, verify):
    """Its own options are what holds, that of verification too: nothing waits any more."""
    launched()
    model = load(llama)
    handle = enable_prefix_sharing(model, backend="sdpa", verify=verify)
    assert not waits(model)
    model(**rows())
    assert (handle.stats.calls, handle.stats.bypassed) == (1, {})
    assert handle.backend == "sdpa"
    handle.remove()
    assert not model.base_model._forward_pre_hooks


def test_script_that_switches_sharing_on_in_a_block(launched, llama):
    """After it the model still waits for the verification of the launcher."""
    launched()
    model = get_peft_model(load(llama), LoraConfig())
    inner = model.get_base_model()
    with enable_prefix_sharing(model) as sharing:
        model(**rows())
        assert sharing.stats.calls == 1
        assert not waits(inner)
    assert waits(inner)
    model(**rows())
    assert not waits(inner)
    assert stats_of(inner).calls == 2


def test_encoder_is_left_alone_with_a_warning(launched, bert, capsys):
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    want = AutoModel.from_pretrained(bert)(ids).last_hidden_state
    switch = launched()
    with pytest.warns(UserWarning, match="BertModel .*runs without prefix sharing: .*bidirection"):
        model = AutoModel.from_pretrained(bert)
    assert torch.equal(model(ids).last_hidden_state, want)
    (line,) = summary(switch, capsys)
    assert re.match("prefix sharing: BertModel from .*: not shared: .* bidirectional", line)


def test_models_without_decoder_layers_are_refused(launched):
    model = transformers.EncodecModel(transformers.EncodecConfig(num_filters=4, hidden_size=8))
    with pytest.warns(UserWarning, match="EncodecModel is not one stack of layers"):
        launched().launch().loaded(model)


# Trainers.


def test_model_built_without_from_pretrained(launched, llama, tmp_path, capsys):
    """Enabled when the trainer is there, which is too late for what its constructor computes."""

    model = tiny_model("llama", vocab_size=64, max_position_embeddings=128)
    want = build_trainer(copy.deepcopy(model), tmp_path, lora=True)
    switch = launched()
    got = build_trainer(model, tmp_path, lora=True)
    for trainer in (want, got):
        trainer.train()
    assert_same_log(got.state.log_history, want.state.log_history)
    assert stats_of(got.model.get_base_model()).calls == 6
    assert "(policy of DPOTrainer)" in summary(switch, capsys)[0]
    with pytest.warns(UserWarning, match="before sharing was enabled"):
        build_trainer(tiny_model(vocab_size=64), tmp_path, lora=True, precompute_ref_log_probs=True)


def test_a_trainer_verifies_all_its_models_once(launched, llama, tmp_path):
    class Distilling(Trainer):
        def __init__(self, teacher, **options):
            super().__init__(**options)
            self.teacher = teacher

    launched()
    student, teacher = (load(llama) for _ in range(2))
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    trainer = Distilling(teacher, model=student, args=arguments)
    for model in (trainer.model, trainer.teacher):
        assert patch_of(model.base_model) is not None
        assert not waits(model)


def test_collator_metrics_and_budget(launched, llama, tmp_path):
    launched(log_metrics=True, max_tokens_per_batch=300)
    options = {"precompute_ref_log_probs": True, "logging_steps": 1}
    trainer = build_trainer(llama, tmp_path, lora=True, **options)
    before = stats_of(trainer.model.get_base_model()).packed_tokens
    trainer.train()
    assert isinstance(trainer.data_collator, PlanningCollator)
    assert trainer_patch_of(trainer).budget is not None
    first, *_ = trainer.state.log_history
    assert 0 < first["prefix_sharing/packed_tokens"] <= 300 < before


def test_subclasses_are_enabled_once_at_the_end_of_their_constructor(launched, llama, tmp_path):
    """Those that exist and those that come, with constructors of their own or without."""
    launched()
    seen = []

    class Later(DPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(trainer_patch_of(self))

    class Last(Later):
        pass

    options = {"args": build_trainer(llama, tmp_path, lora=True).args}
    options |= {"train_dataset": preference_pairs(), "processing_class": tiny_tokenizer()}
    trainer = Last(model=llama, **options)
    assert seen == [None]
    assert trainer_patch_of(trainer) is not None
    with pytest.raises(TypeError, match="unexpected"):
        Last(model=llama, unexpected=1, **options)
    assert trainer_patch_of(Last(model=llama, **options)) is not None


def test_further_model_of_a_trainer(launched, llama, tmp_path, capsys):
    """A reward model, a teacher: verified with the trainer, once, and named in the summary."""
    switch = launched()
    trainer = build_trainer(load(llama), tmp_path)

    class Judged(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.judges = [load(llama)]

    judged = Judged(trainer.model, trainer.args)
    judge = judged.judges[0].base_model
    assert patch_of(judge) is not None
    assert patch_of(judge).before_first_call is None
    assert any("(judges[0] of Judged)" in line for line in summary(switch, capsys))


def test_constructors_keep_their_signatures_and_come_back(launched, llama, tmp_path):
    def state():
        classes = (PreTrainedModel, Trainer, DPOTrainer, trl.SFTTrainer)
        return [dict(vars(cls)) for cls in classes]

    before, signature = state(), inspect.signature(DPOTrainer)
    switch = launched()
    assert state() != before
    assert inspect.signature(DPOTrainer) == signature
    assert switch_on(LaunchOptions(backend="sdpa")) is switch
    assert switch.options.backend == "sdpa"
    switch.off()
    assert state() == before  # and the fixture switches it off once more


def test_trainer_whose_model_is_refused(launched, bert, tmp_path):
    launched()
    with pytest.warns(UserWarning, match="runs without"):
        model = BertForSequenceClassification.from_pretrained(bert)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(NotImplementedError, match="uses bidirectional attention") as info:
        Trainer(model, args)
    assert any("'warn' lets Trainer train without" in note for note in info.value.__notes__)
    with pytest.raises(TypeError, match="target is a Linear"):
        Trainer(nn.Linear(2, 2), args)


def test_refused_trainer_trains_unshared_if_asked(launched, llama, tmp_path, capsys):
    options = {"lora": True, "neftune_noise_alpha": 5.0}
    want = build_trainer(llama, tmp_path, **options)
    switch = launched(on_refusal="warn")
    with pytest.warns(UserWarning, match="DPOTrainer runs without prefix sharing: .*neftune"):
        got = build_trainer(llama, tmp_path, **options)
    assert patch_of(got.model.get_base_model().base_model) is None
    assert not got.model.get_base_model().base_model._forward_pre_hooks
    for trainer in (want, got):
        torch.manual_seed(0)
        trainer.train()
    for ours, theirs in zip(got.state.log_history, want.state.log_history, strict=True):
        assert ours.get("loss") == theirs.get("loss")
    loaded, refused = summary(switch, capsys)
    assert loaded.endswith(": not called while sharing was enabled")
    assert "DPOTrainer: not shared: the trainer sets neftune" in refused


def test_models_of_a_refused_trainer_run_unshared(launched, llama, tmp_path):
    """They were shared when they were loaded, each by itself."""
    launched(on_refusal="warn")
    pair = nn.ModuleList([load(llama), load(llama)])
    assert all(patch_of(model.base_model) is not None for model in pair)
    with pytest.warns(UserWarning, match="runs without prefix sharing: .* with 2 models"):
        Trainer(pair, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert all(patch_of(model.base_model) is None for model in pair)


def test_weights_that_are_not_here_cannot_be_verified(launched, llama, tmp_path):
    """The sharing goes on, and the user is told."""
    launched()

    class Absent(DPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ref_model.to("meta")

    args = build_trainer(llama, tmp_path, lora=True).args
    options = {"train_dataset": preference_pairs(), "processing_class": tiny_tokenizer()}
    options |= {"peft_config": None, "ref_model": load(llama)}
    with pytest.warns(UserWarning, match="Absent was not verified: its weights are on the meta"):
        trainer = Absent(model=llama, args=args, **options)
    assert patch_of(trainer.model.base_model) is not None
    assert device_of(trainer.model).type != "meta"


def test_sharded_weights_of_a_loop_of_ones_own(launched, llama):
    launched()
    model = load(llama)
    next(model.parameters()).ds_id = 0
    with pytest.warns(
        UserWarning,
        match="LlamaModel was not verified: its weights are sharded",
    ):
        model(**rows())
    assert stats_of(model).calls == 1


VERL = """
from contextlib import contextmanager

from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM


class FSDPEngine:
    def __init__(self, path):
        self.path = path

    def initialize(self):
        self.module = AutoModelForCausalLM.from_pretrained(self.path)
        for layer in self.module.model.layers:
            fully_shard(layer)
        fully_shard(self.module).register_forward_pre_hook(self.check)
        self.loaded = False

    def check(self, module, args):
        assert self.loaded, "weights are offloaded"

    @contextmanager
    def eval_mode(self):
        self.loaded = True
        self.module.eval()
        yield
        self.loaded = False


class Engine(FSDPEngine):
    pass
"""

DEEPSPEED = """
from torch import nn


class DeepSpeedEngine(nn.Module):
    pass


def initialize(model, stage):
    for weight in model.parameters() if stage == 3 else ():
        weight.ds_id = 0
    engine = DeepSpeedEngine()
    engine.module = model
    return engine, None, None, None
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Imports a module of another framework, of which there is a few lines that do the same; one
    that is installed is set aside."""
    packages = {"deepspeed", "verl"}

    def loaded():
        return [name for name in sys.modules if name.partition(".")[0] in packages]

    def write(name, source):
        folder = tmp_path / name.replace(".", "/")
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    yield write
    for name in loaded():
        del sys.modules[name]


@pytest.fixture
def engine(stand_in, one_process):
    """Shards the model before it can be verified; its weights are there in a context alone."""
    return stand_in("verl.workers.engine.fsdp.transformer_impl", VERL).Engine


def run_packed(engine):
    """As verl calls a model."""
    with engine.eval_mode():
        return run(engine.module, preference_batch(), one_row=True, use_cache=False)


def test_engine_of_verl(launched, llama, engine):
    """Verified when it is whole; rows without padding are shared, sharded weights and all."""
    plain = engine(llama)
    plain.initialize()
    want = run_packed(plain)
    switch = launched()
    made = engine(llama)
    made.initialize()
    assert_same_run(run_packed(made), want)
    stats = stats_of(made.module)
    assert (stats.calls, stats.bypassed) == (1, {})
    assert stats.packed_tokens < stats.row_tokens
    switch.off()
    assert not hasattr(engine.initialize, "__wrapped__")


def test_engine_of_verl_that_splits_rows(launched, llama, engine, monkeypatch):
    """Ulysses: each process would take its part of a row for the row."""
    ulysses = types.SimpleNamespace(get_ulysses_sequence_parallel_world_size=lambda: 2)
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", ulysses)
    plain = engine(llama)
    plain.initialize()
    launched()
    made = engine(llama)
    with pytest.warns(UserWarning, match="LlamaModel runs without .*context parallel"):
        made.initialize()
    assert patch_of(made.module.base_model) is None
    assert_same_run(run_packed(made), run_packed(plain))


def test_engine_of_verl_without_verification(launched, llama, engine):
    launched(verify=False)
    made = engine(llama)
    made.initialize()
    run_packed(made)
    reason = "several documents in a row, of a model that was not verified"
    assert (stats_of(made.module).calls, stats_of(made.module).bypassed) == (0, {reason: 1})


def test_engine_of_deepspeed(launched, llama, stand_in):
    """Weights that ZeRO-3 has sharded can be gathered when the engine is made, and not within its
    first call; others are left for that."""
    switch = launched()
    deepspeed = stand_in("deepspeed", DEEPSPEED)
    deepspeed.initialize(model=tiny_model(), stage=3)
    assert not switch.used
    for stage in (2, 3):
        engine, *_ = deepspeed.initialize(model=load(llama), stage=stage)
        model = engine.module
        assert waits(model) == (stage == 2)
        run(model, preference_batch(), one_row=True, use_cache=False)
        assert (stats_of(model).calls, stats_of(model).bypassed) == (1, {})
    several = nn.ModuleList([load(llama), load(llama)])
    deepspeed.initialize(model=several, stage=3)
    assert not any(map(waits, several))
    switch.off()
    assert not hasattr(deepspeed.initialize, "__wrapped__")


def test_engine_of_a_model_that_is_nan(launched, llama, stand_in):
    """It cannot be compared."""
    launched()
    model = load(llama)
    model.base_model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="LlamaModel runs without .* are NaN or infinite"):
        stand_in("deepspeed", DEEPSPEED).initialize(model=model, stage=3)
    assert patch_of(model.base_model) is None


def test_module_of_the_users_own_that_is_named_like_a_framework(launched, llama, stand_in):
    launched()
    load(llama)
    assert stand_in("deepspeed", "def initialize(): return 1").initialize() == 1


def test_backend_that_is_named_is_asked_for_when_it_is_needed(launched, llama, tmp_path):
    """Models are loaded on the CPU and moved later."""
    launched(backend="torch_varlen")
    model = load(llama)
    with pytest.raises(NotImplementedError, match="'torch_varlen' cannot serve this Llama"):
        build_trainer(model, tmp_path, lora=True)
    other = load(llama)
    with pytest.warns(UserWarning, match="runs without .* 'torch_varlen' cannot serve"):
        other(**rows())


def test_unknown_backend_stops_at_the_first_model(launched, llama):
    launched(backend="nosuch")
    with pytest.raises(ValueError, match="backend is 'nosuch', but must be one of"):
        load(llama)


@by_method
def test_precomputing_after_enabling_the_model_does_not_warn(llama, tmp_path, lora):
    """Of the trainer form without a launcher: only what was not shared is pointed out."""
    model = load(llama)
    enable_prefix_sharing(model)
    trainer = build_trainer(model, tmp_path, lora=lora, precompute_ref_log_probs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_prefix_sharing(trainer)


# The variable.


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("1", {}),
        ("{}", {}),
        ('{"backend": "sdpa", "verify": false}', {"backend": "sdpa", "verify": False}),
        ('{"max_tokens_per_batch": 9}', {"max_tokens_per_batch": 9}),
        ('{"keep_groups": true}', {"keep_groups": True}),
    ],
)
def test_values_of_the_variable(text, options):
    assert LaunchOptions.parse(text) == LaunchOptions(**options)
    assert LaunchOptions.parse(str(LaunchOptions(**options))) == LaunchOptions(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("true", "must be 1, or options"),
        ("[1]", "must be 1, or options"),
        ('{"max_tokens_per_batch": true}', "sets max_tokens_per_batch to True"),
        ('{"backend": "flash2"}', r"sets backend to 'flash2', .* one of \('auto', 'flash'"),
    ],
)
def test_bad_values_of_the_variable(text, message):
    """More of them are in bad_input_cases."""
    with pytest.raises(ValueError, match=message):
        LaunchOptions.parse(text)


# Other processes.


def python(*arguments, code=0, at_start=None, **variables):
    """Run Python with this copy of the package; `at_start`: a folder where its .pth is put to work,
    as an installed wheel does."""
    paths = [*([str(at_start)] if at_start else []), str(ROOT), str(ROOT / "tests")]
    if at_start:
        shutil.copy(ROOT / "hf_prefix_patch" / "switch.pth", at_start / "hf_prefix_patch.pth")
        line = f"import site; site.addsitedir({str(at_start)!r})"
        (at_start / "sitecustomize.py").write_text(line)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == code, run.stderr
    return run


SCRIPT = '''"""Words."""
import json, multiprocessing, os, pickle, sys

def double(x): return 2 * x

class Thing: pass

if __name__ == "__main__":
    main = sys.modules["__main__"]
    said = {name: str(value) for name, value in vars(main).items() if name[:2] == "__"}
    said |= {"argv": sys.argv, "first": sys.path[0], "same": main.double is double}
    said["thing"] = type(pickle.loads(pickle.dumps(Thing()))).__module__
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            said[method] = pool.map(double, [1, 2])
    said |= {"__builtins__": __builtins__.__name__}
    del said["__loader__"], said["__spec__"]
    print(json.dumps(sorted(said.items())), __spec__ and __spec__.name, type(__loader__).__name__)
    end = sys.argv[-1]
    if end == "raise":
        raise ValueError("the script's own")
    sys.exit(int(end) if end.isdigit() else None)
'''


@pytest.mark.parametrize(
    ("module", "first", "end", "code"),
    [(False, ["--"], "x", 0), (True, [], "3", 3), (False, [], "raise", 1)],
)
def test_script_is_run_as_python_runs_it(tmp_path, monkeypatch, module, first, end, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "script.py").write_text(SCRIPT)
    target = ["-m", "some.script"] if module else ["./some/script.py"]
    arguments = [*target, *first, "--backend", "-m", "--", end]
    want = python(*arguments, code=code)
    got = python("-m", "hf_prefix_patch", "run", *arguments, code=code)
    assert got.stdout == want.stdout
    assert "spawn" in got.stdout
    if end == "raise":
        assert "ValueError: the script's own" in got.stderr
    # A script that failed has said something else.
    assert ("this process loaded no model and built no trainer" in got.stderr) == (code == 0)


def test_options_of_the_command_reach_the_processes_of_the_script(tmp_path):
    (tmp_path / "script.py").write_text("import os; print(os.environ['HF_PREFIX_PATCH'])")
    flags = "--backend flex --no-verify --on-bypass raise --on-refusal warn --log-metrics"
    flags += " --max-tokens-per-batch 512"
    command = ["-m", "hf_prefix_patch", "run", *flags.split(), tmp_path / "script.py"]
    want = LaunchOptions("flex", False, "raise", "warn", True, 512)
    assert LaunchOptions.parse(python(*command).stdout) == want
    # The variable as it was found says what the command does not.
    variable = {"HF_PREFIX_PATCH": '{"backend": "sdpa", "keep_groups": true, "log_metrics": true}'}
    command = ["-m", "hf_prefix_patch", "run", "--backend", "flex", tmp_path / "script.py"]
    got = LaunchOptions.parse(python(*command, **variable).stdout)
    assert got == LaunchOptions("flex", keep_groups=True, log_metrics=True)
    assert LaunchOptions.parse(python(*command, HF_PREFIX_PATCH="0").stdout).backend == "flex"
    bad = python(*command, HF_PREFIX_PATCH='{"backend": "no"}', code=2).stderr
    assert "error: HF_PREFIX_PATCH sets backend to 'no', but must set it to one of" in bad


def test_other_commands_are_not_launched(launched, llama):
    """`verify` shares by itself what it has first run unshared."""
    launched(backend="nosuch")
    with pytest.raises(SystemExit) as end:
        main(["verify", llama, "--pairs", "2", "--repeats", "1"])
    assert end.value.code == 0
    assert switch_that_is_on() is None


def test_command_line(tmp_path):
    """Help and version come without torch."""
    program = (
        "-c",
        (
            "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
            "from hf_prefix_patch.cli import main; main(sys.argv[1:])"
        ),
    )
    assert "run a training script" in python(*program, "--help").stdout
    assert "--max-tokens-per-batch N" in python(*program, "run", "--help").stdout
    assert (
        python(*program, "--version").stdout == f"hf-prefix-patch {hf_prefix_patch.__version__}\n"
    )
    assert "COMMAND" in python(*program, code=2).stderr
    forgotten = python(*program, "train.py", "--x", code=2).stderr
    assert "to run a script: hf-prefix-patch run train.py" in forgotten
    unknown = python(*program, "run", "--log-metric", "x.py", code=2).stderr
    assert "usage: hf-prefix-patch run [options]" in unknown
    assert "unknown option --log-metric; --help lists those of this command" in unknown
    assert "'flash2' (choose from" in python(*program, "run", "--backend", "flash2", code=2).stderr
    missing = python(*program, "run", "nosuch.py", code=2).stderr
    assert "no file 'nosuch.py'; give a Python file" in missing
    assert "variable" not in missing
    installed = python(*program, "run", "sh", code=2).stderr
    assert "For an installed command set the variable instead: HF_PREFIX_PATCH=1 sh" in installed
    for module in ("nosuch.module", "json", ".json"):
        missing = python(*program, "run", "-m", module, code=1).stderr
        assert "that can be run" in missing


def test_start_of_python(tmp_path):
    """Without the variable nothing is imported, with it the standard library only; a bad value ends
    the programs that it concerns."""
    seen = "import sys; print(*(n in sys.modules for n in ('hf_prefix_patch', 'torch')))"
    start = {"at_start": tmp_path}
    for value, loaded in {"": False, "0": False, "1": True, "no": True}.items():
        assert python("-c", seen, HF_PREFIX_PATCH=value, **start).stdout == f"{loaded} False\n"
    (tmp_path / "transformers").mkdir()  # found before the real one
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "modeling_utils.py").write_text("class PreTrainedModel: ...")
    imports = "import transformers; print('fine'); import transformers.modeling_utils; print('no')"
    run = python("-c", imports, HF_PREFIX_PATCH="no", code=1, **start)
    assert run.stderr.splitlines()[-1].startswith("hf_prefix_patch: HF_PREFIX_PATCH='no' is set")
    assert run.stdout == "fine\n"


def test_wheel_brings_the_start_up_file():
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    (name,) = targets["targets"]["wheel"]["force-include"]
    assert "switch_on_from_environment" in (ROOT / name).read_text()
    assert len((ROOT / name).read_text().splitlines()) == 1


def test_two_processes(llama, tmp_path):
    """Against one process without sharing; the summary is that of the first, once."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        preference_pairs().to_json(folder / "pairs.jsonl")
    run = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *("-m", "hf_prefix_patch", "run", ROOT / "tests" / "launched_script.py"),
        *(llama, folders[1]),
    )
    (line,) = re.findall("^logs (.*)$", run.stdout, flags=re.M)
    for got, want in zip(json.loads(line), both(llama, str(folders[0])), strict=True):
        for log in (*got, *want):
            log.pop("total_flos", None)
        assert_same_log(got, want)
    lines = re.findall(r"^prefix sharing \(first of 2 processes\): (.*)$", run.stderr, flags=re.M)
    assert ["policy of" in line for line in lines] == [True, False, True]
    assert [int(re.search(r"(\d+) calls", line)[1]) for line in lines] == [3, 3, 3 + 3]
    assert all(line.endswith("bypassed: none") for line in lines)


def test_command_line_of_trl(llama, tmp_path, capsys):
    """`trl dpo` under the variable: it launches another process, which shares."""
    data = tmp_path / "data"
    data.mkdir()
    preference_pairs().to_json(data / "train.jsonl")
    options = (
        f"--model_name_or_path {llama} --dataset_name {data} --output_dir {tmp_path / 'out'} "
        "--dtype float32 --max_steps 3 --per_device_train_batch_size 4 --learning_rate 2e-3 "
        "--logging_steps 1 --bf16 false --use_cpu --report_to none --disable_tqdm true "
        "--save_strategy no"
    ).split()
    environment = {"HF_PREFIX_PATCH": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = python("-m", "trl.cli.main", "dpo", *options, at_start=tmp_path, **environment)
    capsys.readouterr()
    dpo.main(*dpo.make_parser().parse_args_and_config(options))

    def logs(text):
        found = re.findall("^{'loss'.*}$", text, flags=re.M)
        return [{k: float(v) for k, v in json.loads(x.replace("'", '"')).items()} for x in found]

    got, want = logs(run.stdout), logs(capsys.readouterr().out)
    assert len(want) == 3
    assert_same_log(got, want)
    lines = re.findall("^prefix sharing: .*$", run.stderr, flags=re.M)
    assert [int(re.search(r"(\d+) calls", line)[1]) for line in lines] == [3, 3]
