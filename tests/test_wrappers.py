"""Sharing inside of what training wraps around a model, on one process and on two."""

import copy
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, cpu_offload
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.hooks import remove_hook_from_module
from accelerate.state import AcceleratorState
from batches import LayerTokens, assert_same_run, completion_logps, preference_batch, run
from families import tiny_model
from peft import get_peft_model
from tiny_trl import lora_config, perturb, preference_pairs, save_tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)
from trl.models.activation_offloading import OffloadActivations
from varlen_emulator import install_torch_varlen, needs_half, serve
from wrappers_on_ranks import CASES, DEEPSPEED_CASES, HAS_DEEPSPEED

import hf_prefix_patch
from hf_prefix_patch import disable_prefix_sharing, enable_prefix_sharing
from hf_prefix_patch.backends.varlen import TORCH_VARLEN
from hf_prefix_patch.hooks import is_shared

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("accelerate/*.yaml"))
BEFORE_AND_AFTER = ("before", "after")


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """What two processes saw: a list of `{(case, way): results}`, one a rank."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parent / "wrappers_on_ranks.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*launcher, "--nproc_per_node=2", str(script), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def assert_equal_to_unpatched(on_ranks, name, way):
    """Log-probs of each rank and reduced gradients of each step."""
    case = (CASES | DEEPSPEED_CASES)[name]
    for rank, results in enumerate(on_ranks):
        got, want = results[name, way], results[name, "unpatched"]
        assert len(got["logps"]) == len(want["logps"]) == 2
        for ours, theirs in zip(got["logps"], want["logps"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
        assert len(got["gradients"]) == len(want["gradients"]) > 0
        for ours, theirs in zip(got["gradients"], want["gradients"], strict=True):
            # Biases of keys, in a vision tower, have no gradient but for rounding.
            zeros = torch.zeros(1)
            assert_same_run((zeros, ours), (zeros, theirs), of_model=case.images)
        if case.alone and rank:
            assert (got["calls"], got["bypassed"]) == (0, {"nothing to gain": 2})
        else:
            packed, padded = got["tokens"]
            assert (got["calls"], got["bypassed"]) == (2, {})
            if case.images:
                assert packed == 2 * ((9 * (4 if rank else 2)) + 10)
            else:
                assert 0 < packed < 0.8 * padded


@pytest.mark.parametrize("way", BEFORE_AND_AFTER)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.half])
def test_equal_to_unpatched(on_ranks, name, way):
    assert_equal_to_unpatched(on_ranks, name, way)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("way", BEFORE_AND_AFTER)
@pytest.mark.parametrize("name", DEEPSPEED_CASES)
def test_deepspeed(on_ranks, name, way):
    assert_equal_to_unpatched(on_ranks, name, way)


@pytest.mark.parametrize("way", BEFORE_AND_AFTER)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.half])
def test_mixed_precision_of_a_wrapper(on_ranks, name, way):
    """fp32 weights that FSDP2 casts to bf16: the half-precision backend serves, no less exactly
    than the unpatched model. Where embeddings are not cast, the first call has to show it."""
    first = 1 if (name, way) == ("fsdp2-bf16-layers", "before") else 0
    for results in on_ranks:
        got, unpatched, exact = (
            results[name, way],
            results[name, "unpatched"],
            results["fsdp2", way],
        )
        assert (got["calls"], got["bypassed"], got["backend"]) == (2, {}, "torch_varlen")
        assert got["kernel_calls"] == 2 * (2 - first)  # two layers, two steps
        for ours, theirs, truth in zip(
            got["logps"], unpatched["logps"], exact["logps"], strict=True
        ):
            assert (ours - truth).norm() <= 2 * (theirs - truth).norm()
        for ours, theirs, truth in zip(
            got["gradients"], unpatched["gradients"], exact["gradients"], strict=True
        ):
            assert ours.keys() == theirs.keys() == truth.keys()
            errors = [
                sum((x[name].float() - truth[name]).square().sum() for name in truth) ** 0.5
                for x in (ours, theirs)
            ]
            assert errors[0] <= 2 * errors[1]


def part_to(device):
    """Where `device_map` puts the modules of a tiny model: half of the layers elsewhere."""
    rest = ("embed_tokens", "rotary_emb", "layers.0", "norm")
    return {"model.layers.1": device, "lm_head": device} | {f"model.{name}": "cpu" for name in rest}


@pytest.fixture
def saved(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("device_map", ["cpu", part_to("disk"), {"": "disk"}])
def test_device_map(saved, tmp_path, device_map):
    """Weights that are on disk, and on the meta device, between calls."""
    batch, inner = preference_batch(), AutoModelForCausalLM.from_pretrained(saved)
    want = completion_logps(inner.train()(**batch.inputs).logits, batch)
    offload = {"offload_folder": tmp_path / "offload"}
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, **offload).train()
    assert device_map == "cpu" or any(weight.is_meta for weight in model.parameters())
    tokens = LayerTokens(model)
    with enable_prefix_sharing(model) as sharing, torch.no_grad():
        tokens.shapes.clear()
        got = completion_logps(model(**batch.inputs).logits, batch)
        inputs = {**batch.inputs, "completion_mask": batch.completion}
        direct = hf_prefix_patch.completion_logps(model, inputs)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(direct, want, atol=2e-5, rtol=2e-5)
    assert tokens.shapes == [(1, sharing.stats.packed_tokens // 2)] * 2
    assert sharing.backend == "sdpa"


@pytest.mark.parametrize("early", [True, False])
def test_adapters_on_offloaded_weights(early):
    """The frozen weights of a decoder layer come for its forward, and again for its backward."""
    batch, model = preference_batch(), get_peft_model(tiny_model(), lora_config())
    perturb(model)
    want = run(model, batch)
    if early:
        sharing = enable_prefix_sharing(model)
    for layer in model.get_base_model().model.layers:
        cpu_offload(layer.mlp, execution_device=torch.device("cpu"))
    if not early:
        sharing = enable_prefix_sharing(model)
    assert any(weight.is_meta for weight in model.parameters())
    assert_same_run(run(model, batch), want)
    assert sharing.stats.calls == 1
    remove_hook_from_module(model, recurse=True)
    assert not any(weight.is_meta for weight in model.parameters())
    assert_same_run(run(model, batch), want)
    assert sharing.stats.calls == 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["torch", "trl"])
def test_activation_offloading(monkeypatch, kind, checkpointing):
    batch, model = preference_batch(), tiny_model()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    want = run(model, batch)
    if kind == "torch":
        offloading = torch.autograd.graph.save_on_cpu()
    else:  # of TRL's trainers; it wants an accelerator to bring activations back to
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda *args: torch.device("cpu")
        )
        monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
        options = {"use_pin_memory": False, "use_streams": False, "min_offload_size": 0}
        offloading = OffloadActivations(**options)
    with enable_prefix_sharing(model) as sharing, offloading:
        assert_same_run(run(model, batch), want)
    assert kind == "torch" or offloading.tensor_id > 0
    assert sharing.stats.calls == 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("way", BEFORE_AND_AFTER)
def test_accelerate_prepares_and_unwraps(monkeypatch, precision, way):
    """Its autocast lives in the forward of the model that it returns: verification goes there."""
    calls = install_torch_varlen(monkeypatch)
    serve(monkeypatch, TORCH_VARLEN, needs_half)
    # Trainers of other tests in this process have left a state, with a precision of its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    try:
        model, batch = tiny_model(), preference_batch()
        want = run(model, batch)
        if way == "before":
            sharing = enable_prefix_sharing(model)
        prepared = accelerator.prepare_model(model)
        if way == "after":
            sharing = enable_prefix_sharing(prepared)
            assert sharing.backend == ("torch_varlen" if precision == "bf16" else "sdpa")
        got = run(prepared, batch)
        assert bool(calls) == (precision == "bf16")
        if precision == "no":
            assert_same_run(got, want)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert unwrapped is model
        assert_same_run(run(unwrapped, batch), want)
        assert (sharing.stats.calls, sharing.backend) == (2, "sdpa")
    finally:
        accelerator.state._reset_state(reset_partial_state=True)


def test_data_parallel_of_one_device():
    """Without several devices it calls the module inside."""
    batch, model = preference_batch(), tiny_model()
    want = run(model, batch)
    wrapped = nn.DataParallel(model)
    with enable_prefix_sharing(wrapped) as sharing:
        logps = completion_logps(wrapped(**batch.inputs).logits, batch)
    torch.testing.assert_close(logps.detach(), want[0], atol=2e-5, rtol=2e-5)
    assert sharing.stats.calls == 1


def replica_of(module):
    """What `torch.nn.parallel.replicate` makes, which needs several GPUs."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child)
    replica._former_parameters = {}
    for name, weight in module._parameters.items():
        setattr(replica, name, weight if weight is None else weight * 1.0)
    return replica


def test_data_parallel_of_several_devices():
    """Each has some of the rows: calls run as they are, are counted, and said once."""
    batch, model = preference_batch(), tiny_model()
    want = run(model, batch)[0]
    with enable_prefix_sharing(model) as sharing:
        replica = replica_of(model)
        with pytest.warns(UserWarning, match="bypassed: DataParallel.*DistributedDataParallel"):
            logps = completion_logps(replica(**batch.inputs).logits, batch)
        completion_logps(replica(**batch.inputs).logits, batch).sum().backward()
    torch.testing.assert_close(logps.detach(), want)
    assert model.lm_head.weight.grad is not None
    assert (sharing.stats.calls, sum(sharing.stats.bypassed.values())) == (0, 2)


def test_a_head_that_cannot_serve_the_verification():
    """A reward model without pad_token_id takes one row at a time."""
    config = tiny_model().config
    config.pad_token_id = None
    model = LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match="padding token"):
        model(**preference_batch().inputs)
    with enable_prefix_sharing(model) as sharing:
        model.config.pad_token_id = 0
        assert model(**preference_batch().inputs, use_cache=False).logits.shape == (4, 2)
    assert sharing.stats.calls == 1


def test_a_wrapper_that_takes_something_else():
    class OfBatches(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, batch):
            return self.module(**batch)

    model = tiny_model()
    with pytest.raises(RuntimeError, match="OfBatches does not take what a model takes"):
        enable_prefix_sharing(OfBatches(model))
    assert not model.model._forward_pre_hooks
    with enable_prefix_sharing(OfBatches(model), verify=False):
        assert model.model._forward_pre_hooks


def test_a_wrapper_that_calls_twice():
    class Twice(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            self.module(**inputs)
            return self.module(**inputs)

    with pytest.raises(RuntimeError, match="Twice called its decoder stack 2 times"):
        enable_prefix_sharing(Twice(tiny_model()))


def test_verification_compiles_nothing():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model = tiny_model()
    model.model = torch.compile(model.model, backend=backend)
    for wrapped in (model, torch.compile(nn.DataParallel(model), backend=backend)):
        enable_prefix_sharing(wrapped).remove()
    assert not compiled
    model(**preference_batch().inputs)
    assert compiled


def test_what_a_call_shows_of_its_dtype(monkeypatch):
    """A dtype that the backend does not have raises, and the next call has another backend."""
    install_torch_varlen(monkeypatch)
    serve(monkeypatch, TORCH_VARLEN, needs_half)
    model, batch = tiny_model().bfloat16(), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        assert sharing.backend == "torch_varlen"
        hooks = [
            attention.register_forward_pre_hook(
                lambda module, args, kwargs: (args, in_fp32(kwargs)), with_kwargs=True
            )
            for attention in (layer.self_attn.float() for layer in model.model.layers)
        ]
        with pytest.raises(NotImplementedError, match="computes attention in float32"):
            model(**batch.inputs)
        for layer in model.model.layers:
            layer.float()
        model.model.norm.float()
        model.lm_head.float()
        model(**batch.inputs)
        assert sharing.backend == "sdpa"
        for hook in hooks:
            hook.remove()
    with pytest.raises(NotImplementedError, match="not float32"):
        enable_prefix_sharing(model, backend="torch_varlen")


def in_fp32(kwargs):
    return kwargs | {"hidden_states": kwargs["hidden_states"].float()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs(config):
    """accelerate reads them, and knows every option of a plugin."""
    options = launch_command_parser().parse_args(["script.py"])
    loaded = load_config_from_file(str(config))  # raises on what it does not know
    assert loaded.num_processes == 2
    nested = loaded.fsdp_config | loaded.deepspeed_config
    assert all(hasattr(options, name) for name in nested)
    given = yaml.safe_load(config.read_text())
    assert nested == given.get("fsdp_config", {}) | given.get("deepspeed_config", {})


def test_accelerate_launch(tmp_path):
    """The example on two processes, as docs/distributed.md says where there is no GPU."""
    model = save_tiny_model(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, preference_pairs())))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
    launcher += ["--config_file", str(EXAMPLES / "accelerate" / "ddp.yaml")]
    arguments = ["--model", model, "--data", str(pairs), "--steps", "2"]
    run = subprocess.run(
        [*launcher, str(EXAMPLES / "trl_dpo_lora.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("4 calls; bypassed: none") == 2  # policy and reference, two ranks


class OwnRewardModel(LlamaPreTrainedModel):
    """Its stack has a name of its own, and a copy of the config."""

    def __init__(self, config):
        super().__init__(config)
        self.backbone = LlamaModel(copy.deepcopy(config))
        self.score = nn.Linear(config.hidden_size, 1)

    def get_input_embeddings(self):
        return self.backbone.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, **options):
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options)[0]
        last = attention_mask.sum(1) - 1
        return self.score(hidden)[torch.arange(len(last)), last]


def test_a_model_of_the_users_own():
    batch = preference_batch()
    torch.manual_seed(0)
    model = OwnRewardModel(tiny_model().config)
    want = model(**batch.inputs)
    sharing = enable_prefix_sharing(model)
    got = model(**batch.inputs)
    model.config.pad_token_id = 3  # as trainers align it
    assert is_shared(model)
    disable_prefix_sharing(model)
    assert not is_shared(model)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert sharing.stats.calls == 1


def test_a_model_whose_stack_is_not_found():
    """Two of them: which one is called is not known, and scores are no hidden states."""
    torch.manual_seed(0)
    model = OwnRewardModel(tiny_model().config)
    model.other = LlamaModel(model.config)
    with pytest.raises(
        RuntimeError, match=r"returns a tensor of shape \[1\] for rows of \[4, 17\]"
    ):
        enable_prefix_sharing(model)
    assert not model._forward_hooks


def test_two_heads_on_one_stack():
    """A classifier needs no cache; the causal LM beside it may go on from its own all the same."""
    model = tiny_model().eval()
    classifier = LlamaForSequenceClassification(tiny_model().config).eval()
    classifier.model = model.model
    ids = torch.randint(3, 50, (2, 12))
    ids[1, :9] = ids[0, :9]
    for handles in ((model, classifier), (classifier, model)):
        with ExitStack() as sharing, torch.no_grad():
            for head in handles:
                sharing.enter_context(enable_prefix_sharing(head))
            with pytest.warns(UserWarning, match="key/value cache by default"):
                assert model(input_ids=ids).past_key_values is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_adapters_around_a_compiled_model():
    model, batch = tiny_model(), preference_batch()
    model = get_peft_model(torch.compile(model, backend="eager"), lora_config())
    with enable_prefix_sharing(model) as sharing:
        run(model, batch)
    assert sharing.stats.calls == 1
