"""Models patched by others: Liger's kernels, where they are installed, and stand-ins for those and
for Unsloth."""

import functools
import os
import sys
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from batches import LayerTokens, assert_same_run, pad_rows, preference_batch, run
from families import tiny_model
from test_peft import lora_config, wrap
from torch import nn
from transformers.models.llama import modeling_llama

from hf_prefix_patch import enable_prefix_sharing

CUDA = torch.cuda.is_available()


def standin_kernels(model):
    """What `_apply_liger_kernel_to_instance` does to a Llama: rotation in place in the modeling
    file, norms and MLPs by instance, and a forward of the causal model that calls the decoder."""

    def rotate(q, k, cos, sin, *args):
        assert cos.shape == (1, q.shape[2], q.shape[3])
        cos, sin = cos[:, None], sin[:, None]
        left, right = q.chunk(2, -1)
        q = q * cos + torch.cat((-right, left), -1) * sin
        left, right = k.chunk(2, -1)
        return q, k * cos + torch.cat((-right, left), -1) * sin

    def norm(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    def mlp(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def causal(self, input_ids=None, attention_mask=None, cache_position=None, **kwargs):
        kwargs |= {"output_attentions": False, "cache_position": cache_position}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return types.SimpleNamespace(logits=self.lm_head(outputs[0]))

    modeling_llama.apply_rotary_pos_emb = rotate
    model.forward = types.MethodType(causal, model)
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.forward = types.MethodType(norm, module)
        elif isinstance(module, modeling_llama.LlamaMLP):
            module.forward = types.MethodType(mlp, module)


def liger_kernels(model):
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)


@pytest.fixture
def liger(monkeypatch):
    """Liger's kernels: on a GPU as they are, elsewhere by Triton's interpreter."""
    pytest.importorskip("liger_kernel", reason="Liger's kernels need liger-kernel and triton")
    if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU, Liger's kernels need TRITON_INTERPRET=1 in the environment")
    if not CUDA:
        interpret_liger(monkeypatch)
    return liger_kernels


def interpret_liger(monkeypatch):
    """Two things that compiled kernels have and interpreted ones lack: numbers given as arguments
    are values of the language, and device functions have a body."""
    import liger_kernel.ops.rms_norm  # noqa: F401
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(x):
        if not isinstance(x, float):
            return convert(x)
        value = np.array([x], dtype=np.float32)
        return tl.tensor(interpreter.TensorHandle(value, tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    norms = sys.modules["liger_kernel.ops.rms_norm"]
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))


@pytest.fixture(autouse=True)
def rotation(monkeypatch):
    """Both replace the rotation for all models of the process; put it back."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


def assert_shares(apply, order, device, batch):
    def make():
        return wrap(tiny_model(), lora_config()).to(device)

    plain = make()
    apply(plain.get_base_model())
    want = run(plain, batch)
    model = make()
    if order == "kernels-then-enable":
        apply(model.get_base_model())
    sharing = enable_prefix_sharing(model)
    if order == "enable-then-kernels":
        apply(model.get_base_model())
    seen = LayerTokens(model)
    assert_same_run(run(model, batch), want)
    assert len(want[1]) == 28
    assert seen.shapes == [(1, sharing.stats.packed_tokens)]
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})


ORDERS = ["kernels-then-enable", "enable-then-kernels"]


@pytest.mark.parametrize("order", ORDERS)
def test_replaced_layers_and_causal_forward(order):
    assert_shares(standin_kernels, order, "cpu", preference_batch())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ORDERS)
def test_liger(liger, order):
    """fp32, so that nothing but the order of sums can differ. A small batch: the interpreter is
    slow."""
    rows = [[5, 6, 7, 8, 9], [5, 6, 7, 10], [11, 12, 13], [11, 12, 14, 15]]
    batch = pad_rows(rows, [3, 3, 2, 2], "right")
    device = "cuda" if CUDA else "cpu"
    assert_shares(liger, order, device, type(batch)(*(x.to(device) for x in vars(batch).values())))


@pytest.mark.filterwarnings("ignore")
def test_liger_switched_on_by_the_trainer(liger, tmp_path):
    """`use_liger_kernel=True` applies the kernels when training begins, after sharing is enabled
    and verified."""
    from tiny_trl import assert_same_log, load, run_dpo, save_tiny_model

    path = save_tiny_model(tmp_path / "model")
    options = {"max_steps": 1, "per_device_train_batch_size": 1, "use_liger_kernel": True}
    options |= {"eval_strategy": "no", "lora": True}
    plain = run_dpo(load(path), tmp_path / "plain", **options)
    shared = run_dpo(load(path), tmp_path / "shared", sharing="trainer", **options)
    assert "lce_forward" not in str(shared.trainer.model.get_base_model().forward)
    norm = shared.trainer.model.get_base_model().model.norm
    assert norm.forward.__func__.__module__.startswith("liger_kernel")
    assert_same_log(shared.log, plain.log)
    assert (shared.handle.stats.calls, shared.handle.stats.bypassed) == (2, {})


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_liger_in_bf16_on_a_gpu(liger):
    """Error to fp32 at most twice that of the rows, with the same kernels, on the same device."""
    batch = preference_batch()
    batch = type(batch)(*(x.cuda() for x in vars(batch).values()))

    def model(dtype):
        made = wrap(tiny_model(head_dim=16), lora_config()).cuda().to(dtype)
        liger(made.get_base_model())
        return made

    truth, rows = (run(model(dtype), batch) for dtype in (torch.float32, torch.bfloat16))
    patched = model(torch.bfloat16)
    with enable_prefix_sharing(patched) as sharing:
        shared = run(patched, batch)
    assert sharing.stats.calls == 1

    def errors(got):
        grads = sum((got[1][n].float() - g).square().sum() for n, g in truth[1].items())
        return (got[0] - truth[0]).norm().item(), grads.sqrt().item()

    for ours, theirs in zip(errors(shared), errors(rows), strict=True):
        assert 0 < ours <= 2 * theirs


def written_by(module):
    """A forward as a file of that name would define it."""
    source = "def fast_forward(self, *args, **kwargs):\n    raise AssertionError('it ran')\n"
    scope = {"__name__": module}
    exec(source, scope)
    return scope["fast_forward"]


def attention_class(module):
    """A class of the modeling file written anew, as Unsloth's compiler does in files of its own."""
    base = modeling_llama.LlamaAttention
    return type(base.__name__, (base,), {"__module__": module, "forward": base.forward})


LLAMA = "unsloth.models.llama"
DECORATED = {
    # accelerate, when a model is spread over devices; `torch.compile` and others wrap alike.
    "by accelerate's hooks": lambda module: add_hook_to_module(module, ModelHook()),
    "as a partial": lambda module: setattr(
        module, "forward", functools.partial(module.forward.__func__, module)
    ),
    "wrapped": lambda module: setattr(
        module, "forward", functools.wraps(module.forward)(lambda *args: None)
    ),
}


def unsloth_patch(way, monkeypatch):
    """Patch classes, and return what is left to do to a model."""
    llama = modeling_llama
    classes = {
        "all classes": [llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention],
        "the decoder's class": [llama.LlamaModel],
        "the attention's class": [llama.LlamaAttention],
        "the causal model's class": [llama.LlamaForCausalLM],
    }
    for cls in classes.get(way, []):
        monkeypatch.setattr(cls, "forward", written_by(LLAMA))
    if way.startswith("a class of its own"):
        module = f"{way.rpartition(' ')[2]}unsloth_compiled_module_llama"
        monkeypatch.setattr(llama, "LlamaAttention", attention_class(module))
    if way == "one attention" or way in DECORATED:

        def one_attention(model):
            attention = model.model.layers[1].self_attn
            bind(attention, written_by(LLAMA))
            DECORATED.get(way, id)(attention)

        return one_attention
    if way == "the MLP of an adapter":
        return lambda model: bind(
            model.model.layers[0].mlp, written_by("unsloth.kernels.fast_lora")
        )
    return lambda model: None


def bind(module, function):
    module.forward = types.MethodType(function, module)


WAYS = [
    "all classes",
    "the decoder's class",
    "the attention's class",
    "the causal model's class",
    "a class of its own, in unsloth_compiled_cache.",
    "a class of its own, in ",
    "a class of its own, in somewhere.",
    "one attention",
    "the MLP of an adapter",
    *DECORATED,
]


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_that_unsloth_patches_is_refused(way, adapter, monkeypatch):
    """By the module that a forward or a class says it is from: nothing of Unsloth is imported."""
    finish = unsloth_patch(way, monkeypatch)
    model = tiny_model()
    target = wrap(model, lora_config()) if adapter else model
    finish(model)
    with pytest.raises(NotImplementedError, match=r"was patched by Unsloth \(Llama\w+\)"):
        enable_prefix_sharing(target)
    assert not model.model._forward_pre_hooks


def test_other_patches_are_not_taken_for_unsloth():
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    forward = type(attention).forward

    def mine(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    mine.__module__ = "research.not_unsloth"
    bind(attention, mine)
    enable_prefix_sharing(model).remove()
