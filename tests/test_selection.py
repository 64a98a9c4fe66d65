"""Which backend is picked, what is said about the others, and the check of kernels."""

import dataclasses
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from families import NO_SDPA, tiny_model
from tiny_trl import build_trainer, load, save_tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel
from varlen_emulator import (
    flash_2,
    flash_with_sinks,
    install_flash,
    install_torch_varlen,
    needs_half,
    serve,
    uninstall_flash,
)

from hf_prefix_patch import attention, enable_prefix_sharing, kernel_check, selection, versions
from hf_prefix_patch.backends.base import Needs
from hf_prefix_patch.backends.sdpa import SDPA
from hf_prefix_patch.backends.varlen import FLASH, TORCH_VARLEN
from hf_prefix_patch.hooks import patch_of

CUDA = Needs(
    device=torch.device("cuda", 0),
    dtype=torch.bfloat16,
    implementation="sdpa",
    head_dims=frozenset({64}),
    windows=frozenset({None}),
    features=frozenset(),
)


@pytest.fixture
def ampere(monkeypatch):
    """A CUDA device as far as picking goes; the kernels pass their check."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(selection, "kernel_fault", lambda backend, needs: None)
    return monkeypatch


def needs(**changes):
    return dataclasses.replace(CUDA, **changes)


@pytest.mark.parametrize(
    ("changes", "picked"),
    [
        ({}, "torch_varlen"),
        ({"dtype": torch.float16}, "torch_varlen"),
        ({"dtype": torch.float32}, "sdpa"),
        ({"windows": frozenset({None, 9}), "features": frozenset({"window"})}, "torch_varlen"),
        ({"features": frozenset({"softcap"})}, "sdpa"),
        ({"features": frozenset({"sinks"})}, "sdpa"),
        ({"features": frozenset({"dropout"})}, "sdpa"),
        ({"head_dims": frozenset({96, 256})}, "torch_varlen"),
        ({"head_dims": frozenset({512})}, "sdpa"),
        ({"head_dims": frozenset({68})}, "sdpa"),
        ({"device": torch.device("cpu")}, "sdpa"),
        ({"device": torch.device("mps")}, "sdpa"),
        ({"implementation": "flash_attention_2"}, "flash"),
        pytest.param(
            {"implementation": "kernels-community/flash-attn2"},
            "flash",
            marks=pytest.mark.needs(transformers=">=4.55"),
        ),
        ({"implementation": "flash_attention_2", "features": frozenset({"softcap"})}, "flash"),
        ({"implementation": "flash_attention_2", "features": frozenset({"sinks"})}, "sdpa"),
        ({"implementation": "flash_attention_2", "dtype": torch.float32}, "sdpa"),
        ({"implementation": "flash_attention_2", "device": torch.device("cpu")}, "sdpa"),
    ],
)
def test_auto(ampere, changes, picked):
    install_flash(ampere, flash_2)
    chosen = selection.select("auto", needs(**changes), "Model")
    assert chosen.backend.name == picked
    assert set(chosen.passed_over) == set(attention.BACKENDS) - {picked}


def test_a_kernel_without_dropout_or_softcap(ampere):
    """What a flash function cannot do is read off its arguments: transformers drops some."""
    install_flash(ampere, flash_with_sinks)
    flash = {"implementation": "flash_attention_3"}
    sinks = selection.select("auto", needs(**flash, features=frozenset({"sinks"})), "Model")
    assert sinks.backend is FLASH
    asked = needs(**flash, features=frozenset({"dropout", "softcap"}))
    reason = selection.select("auto", asked, "Model").passed_over["flash"]
    assert reason == 'the function of "flash_attention_3" has no dropout or softcap'


def test_gpus_that_are_too_old_or_not_cuda(ampere):
    ampere.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0" in selection.unserved(TORCH_VARLEN, CUDA)
    ampere.undo()
    ampere.setattr(torch.version, "hip", "7.0")
    assert "needs a CUDA device" in selection.unserved(TORCH_VARLEN, CUDA)


def test_flash_attention_switched_off(ampere):
    """PyTorch's own raises then from 2.15 on, which must not count as a fault of the kernel."""
    off = needs(kernels=frozenset({"efficient", "math"}))
    ampere.setattr(versions, "VARLEN_IS_SWITCHED_WITH_SDPA", True)
    chosen = selection.select("auto", off, "Model")
    assert chosen.backend is SDPA
    assert "switched off" in chosen.passed_over["torch_varlen"]
    ampere.setattr(versions, "VARLEN_IS_SWITCHED_WITH_SDPA", False)
    chosen = selection.select("auto", off, "Model")
    assert chosen.backend is TORCH_VARLEN
    assert chosen.passed_over["sdpa"] == "torch_varlen comes first"
    named = selection.select("sdpa", off, "Model")
    assert named.passed_over["torch_varlen"] == "sdpa was asked for"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("torch_varlen", {"dtype": torch.float32}, "fp16 or bf16, and the model in float32"),
        ("torch_varlen", {"features": frozenset({"sinks"})}, "has no sinks"),
        ("torch_varlen", {"head_dims": frozenset({100})}, "multiples of 8, not [100]"),
        ("flash", {}, 'loaded with flash attention, and this one has "sdpa"'),
        ("flex", {"features": frozenset({"dropout"})}, "has no dropout"),
        ("flex", {"dtype": torch.float64}, "does not compute in float64"),
        ("flex", {"head_dims": frozenset({8, 16})}, "heads of at least 16, and this model has som"),
        ("flex", {"device": torch.device("cpu")}, "no backward on cpu"),
    ],
)
def test_a_named_backend_that_cannot_serve_is_refused(ampere, name, changes, reason):
    """With the reason, and those that can."""
    with pytest.raises(NotImplementedError, match=re.escape(reason)) as error:
        selection.select(name, needs(**changes), "SomeModel")
    assert f"backend {name!r} cannot serve this SomeModel" in str(error.value)
    assert re.search(r"these can: \[.*'sdpa'.*\]", str(error.value))


def test_no_flash_attention_installed(ampere):
    uninstall_flash(ampere)
    chosen = selection.select("auto", needs(implementation="flash_attention_3"), "Model")
    assert chosen.backend is TORCH_VARLEN
    reason = 'transformers finds no variable-length function for "flash_attention_3"'
    assert reason in chosen.passed_over["flash"]


@pytest.mark.parametrize(
    ("resolved", "implementation", "reason"),
    [
        (True, "flash_attention_2", "the kernel has none"),
        (False, "some/kernel-flash", "it knows ['flash_attention_2', 'flash_attention_3'] only"),
    ],
)
def test_flash_attention_without_ragged_rows(ampere, resolved, implementation, reason):
    """A kernel that has no such function, and one of which an older transformers tells nothing."""
    ampere.setattr(versions, "FLASH_IS_RESOLVED", resolved)
    ampere.setattr(
        "transformers.modeling_flash_attention_utils.lazy_import_flash_attention",
        lambda implementation: ((None, None, None, None), None),
        raising=False,
    )
    chosen = selection.select("auto", needs(implementation=implementation), "Model")
    assert reason in chosen.passed_over["flash"]


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_older_transformers_leave_the_function_to_the_package(ampere, name):
    ampere.setattr(versions, "FLASH_IS_RESOLVED", False)
    package = SimpleNamespace(flash_attn_varlen_func=flash_2)
    module = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[name]
    ampere.setitem(sys.modules, module, package)
    assert selection.select("auto", needs(implementation=name), "Model").backend is FLASH


def test_flex_is_taken_by_name_only(ampere):
    assert "by name only" in selection.select("auto", CUDA, "Model").passed_over["flex"]
    chosen = selection.select("flex", CUDA, "Model")
    assert chosen.backend.name == "flex"
    assert chosen.passed_over["sdpa"] == "flex was asked for"


@pytest.mark.parametrize(
    ("family", "features", "windows"),
    [
        ("llama", set(), {None}),
        ("mistral-window", {"window"}, {5}),
        ("gemma2", {"window", "softcap"}, {5, None}),
        ("gpt-oss", {"window", "sinks"}, {5, None}),
    ],
)
def test_needs_of_a_model(family, features, windows):
    model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa").model
    found = selection.needs_of(model, selection.structure_of(model))
    assert (found.features, found.windows) == (features, windows)
    assert found.head_dims == {8}
    assert found.implementation == model.config._attn_implementation
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")


def test_needs_follow_dtype_autocast_and_dropout():
    model = tiny_model(attention_dropout=0.1).bfloat16().model
    structure = selection.structure_of(model)
    assert selection.needs_of(model, structure).dtype == torch.bfloat16
    assert selection.needs_of(model, structure).features == {"dropout"}
    with torch.autocast("cpu", dtype=torch.float16):
        assert selection.needs_of(model, structure).dtype == torch.float16


def test_needs_of_a_quantised_model_with_flash_attention():
    """Weights around the layers in fp32 say nothing of what attention computes in."""
    model = tiny_model().model
    structure = selection.structure_of(model)
    for mark in versions.QUANTIZED:
        setattr(model.config, mark, torch.float16)
    assert selection.needs_of(model, structure).dtype == torch.float32
    model.config._attn_implementation_internal = "flash_attention_2"
    assert selection.needs_of(model, structure).dtype == torch.float16
    assert selection.needs_of(model.bfloat16(), structure).dtype == torch.bfloat16


def test_dropout_of_the_gpt2_family():
    """Their configs call it otherwise, and it is on by default."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).transformer
    found = selection.needs_of(model, selection.structure_of(model))
    assert (found.features, found.head_dims) == ({"dropout"}, {8})


@pytest.mark.parametrize(
    ("name", "rate"), [("dropout", 0.1), ("attn_pdrop", 0.1), ("attn_dropout", torch.nn.Dropout())]
)
def test_dropout_that_the_layers_tell_of(name, rate):
    """Configs call it by names of their own (Mllama, DBRX)."""
    model = tiny_model().model
    setattr(model.layers[1].self_attn, name, 0.0 if rate == 0.1 else torch.nn.Dropout(0.0))
    assert not selection.needs_of(model, selection.structure_of(model)).features
    setattr(model.layers[1].self_attn, name, rate)
    found = selection.needs_of(model, selection.structure_of(model))
    assert found.features == {"dropout"}


def test_per_call_needs_do_not_walk_the_model(monkeypatch):
    model = tiny_model()
    rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with enable_prefix_sharing(model) as sharing:
        monkeypatch.setattr(selection, "structure_of", None)
        monkeypatch.setattr(selection, "has_sinks", None)
        model(rows)
    assert sharing.stats.calls == 1


def test_the_handle_names_the_backend_and_the_reasons():
    with enable_prefix_sharing(tiny_model()) as sharing:
        assert sharing.backend == "sdpa"
        assert set(sharing.passed_over) == {"flash", "torch_varlen", "flex"}
        assert "on cpu" in sharing.passed_over["torch_varlen"]


def test_a_refused_backend_leaves_model_and_earlier_patch_as_they_were():
    model = tiny_model()
    with pytest.raises(NotImplementedError, match="backend 'flex' cannot serve this LlamaModel"):
        enable_prefix_sharing(model, backend="flex")
    assert not model.model._forward_pre_hooks
    sharing = enable_prefix_sharing(model)
    with pytest.raises(NotImplementedError, match="these can: \\['sdpa'\\]"):
        enable_prefix_sharing(model, backend="torch_varlen", on_bypass="raise")
    rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    model(rows)
    assert sharing.stats.calls == 1


def test_the_backend_follows_the_model(monkeypatch):
    """Picked at the call: enabled in fp32, trained in half precision or under autocast."""
    calls = install_torch_varlen(monkeypatch)
    serve(monkeypatch, TORCH_VARLEN, needs_half)
    model = tiny_model()
    rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with enable_prefix_sharing(model) as sharing:
        model(rows)
        assert (sharing.backend, len(calls)) == ("sdpa", 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(rows)
            assert (sharing.backend, len(calls)) == ("torch_varlen", 2)
        model.bfloat16()
        model(rows)
        assert (sharing.backend, len(calls)) == ("torch_varlen", 4)
    with pytest.raises(NotImplementedError, match="not float32"):
        enable_prefix_sharing(tiny_model(), backend="torch_varlen")


def test_the_backend_follows_what_is_switched_off(monkeypatch):
    """In the middle of training, as a `with` block around some steps does."""

    def unless_switched_off(asked):
        return None if "flash" in asked.kernels else "switched off"

    calls = install_torch_varlen(monkeypatch)
    serve(monkeypatch, TORCH_VARLEN, unless_switched_off)
    model = tiny_model().bfloat16()
    rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with enable_prefix_sharing(model) as sharing:
        for switched_off, picked in ((False, "torch_varlen"), (True, "sdpa")) * 2:
            calls.clear()
            with sdpa_kernel(SDPBackend.MATH) if switched_off else nullcontext():
                model(rows)
            assert (sharing.backend, len(calls)) == (picked, 0 if switched_off else 2)


def test_a_trainers_autocast_is_verified(monkeypatch, tmp_path):
    """fp32 weights under bf16 autocast, as TRL trains by default: the half-precision backend is
    what the verification runs."""
    calls = install_torch_varlen(monkeypatch)
    serve(monkeypatch, TORCH_VARLEN, needs_half)
    trainer = build_trainer(load(save_tiny_model(tmp_path)), tmp_path, bf16=True)
    assert trainer.model.dtype == torch.float32
    enable_prefix_sharing(trainer)
    assert calls


@pytest.fixture
def on_cpu(monkeypatch):
    """Check kernels on the CPU too, anew."""
    monkeypatch.setattr(kernel_check, "_faults", {})

    def fault(backend, asked):
        return kernel_check.find_fault(backend, asked)

    monkeypatch.setattr(selection, "kernel_fault", fault)
    return monkeypatch


CPU_NEEDS = dataclasses.replace(CUDA, device=torch.device("cpu"))
FEATURES = [set(), {"window"}, {"softcap"}, {"sinks"}, {"window", "softcap", "sinks"}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("size", [8, 64])
def test_right_kernels_pass(dtype, features, size):
    windows = frozenset({None, 7} if "window" in features else {None})
    asked = dataclasses.replace(
        CPU_NEEDS,
        dtype=dtype,
        features=frozenset(features),
        windows=windows,
        head_dims=frozenset({size}),
    )
    assert kernel_check.find_fault(SDPA, asked) is None


def broken(backend, change):
    """A backend that computes with changed keyword arguments, or on changed tensors."""

    def attend(module, q, k, v, **kwargs):
        q, k, v, kwargs = change(q, k, v, kwargs)
        return backend.attend(module, q, k, v, **kwargs)

    return dataclasses.replace(backend, attend=attend)


def other_groups(q, k, v, kwargs):
    return q, k.flip(1), v.flip(1), kwargs


def half_scale(q, k, v, kwargs):
    return q, k, v, kwargs | {"scaling": kwargs["scaling"] / 2}


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.2


def wrong_gradient(q, k, v, kwargs):
    return q, _WrongGradient.apply(k), v, kwargs


@pytest.mark.parametrize("change", [other_groups, half_scale, wrong_gradient])
def test_wrong_kernels_are_found(change):
    fault = kernel_check.find_fault(broken(SDPA, change), CPU_NEEDS)
    assert re.match(r"it computes wrong results on cpu \(relative errors: output .*dq .*dk", fault)


def test_kernels_aligned_top_left_are_found(monkeypatch):
    """The mistake that a varlen kernel makes on unequal lengths."""
    calls = install_torch_varlen(monkeypatch)
    assert kernel_check.find_fault(TORCH_VARLEN, CPU_NEEDS) is None
    assert calls
    from torch.nn.attention import varlen

    right = varlen.varlen_attn

    def aligned(q, k, v, cu_q, cu_k, max_q, max_k, **kwargs):
        """Keys at the end of a path beyond its number of queries are lost."""
        lengths, paths = cu_q.diff(), cu_k.diff()
        kept = torch.cat(
            [torch.arange(n) + start for n, start in zip(lengths, cu_k[:-1], strict=True)]
        )
        assert (paths >= lengths).all()
        longest = int(lengths.max())
        return right(q, k[kept], v[kept], cu_q, cu_q.clone(), longest, longest, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", aligned)
    assert "wrong results" in kernel_check.find_fault(TORCH_VARLEN, CPU_NEEDS)


def test_kernels_that_do_not_run_are_found():
    def raises(*args):
        raise RuntimeError("no kernel image is available")

    fault = kernel_check.find_fault(broken(SDPA, raises), CPU_NEEDS)
    assert fault == "it does not run on cpu (RuntimeError: no kernel image is available)"


def test_auto_moves_on_with_a_warning(on_cpu):
    """On a failed check; a named backend raises."""
    install_torch_varlen(on_cpu)
    serve(on_cpu, broken(TORCH_VARLEN, half_scale), needs_half)
    model = tiny_model().bfloat16()
    with pytest.warns(UserWarning, match="does not use its backend 'torch_varlen': it computes"):
        sharing = enable_prefix_sharing(model)
    assert sharing.backend == "sdpa"
    assert "wrong results" in sharing.passed_over["torch_varlen"]
    with pytest.raises(RuntimeError, match=r"computes wrong .*; these can: \['sdpa'\]") as refused:
        enable_prefix_sharing(tiny_model().bfloat16(), backend="torch_varlen")
    assert not isinstance(refused.value, NotImplementedError)
    on_cpu.setattr(selection, "kernel_fault", lambda backend, needs: "it is wrong")
    none = r"no backend of .*'sdpa'.* computes right results"
    warned = pytest.warns(UserWarning, match="does not use its backend '.*': it is wrong")
    with warned, pytest.raises(RuntimeError, match=none):
        enable_prefix_sharing(tiny_model().bfloat16())


def test_the_check_leaves_random_state_and_gradient_mode_alone(on_cpu):
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernel_check.find_fault(SDPA, CPU_NEEDS) is None
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert kernel_check.find_fault(SDPA, CPU_NEEDS) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_running_out_of_memory_says_nothing_of_a_kernel(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        kernel_check.find_fault(broken(SDPA, full), CPU_NEEDS)


def test_the_check_does_not_depend_on_the_default_device():
    with torch.device("meta"):
        assert kernel_check.find_fault(SDPA, CPU_NEEDS) is None


def test_a_kernel_is_checked_once(monkeypatch):
    checks = []
    monkeypatch.setattr(kernel_check, "_faults", {})
    monkeypatch.setattr(kernel_check, "find_fault", lambda *args: checks.append(args))
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16):
        assert kernel_check.kernel_fault(SDPA, needs(dtype=dtype)) is None
    assert len(checks) == 2
    assert kernel_check.kernel_fault(SDPA, CPU_NEEDS) is None  # nothing to check on a CPU
    assert len(checks) == 2


def test_a_kernel_is_checked_again_where_pytorch_was_told_to_take_another(monkeypatch):
    monkeypatch.setattr(kernel_check, "_faults", {})
    monkeypatch.setattr(kernel_check, "find_fault", lambda backend, needs: f"{needs.kernels}")
    for kernels in (frozenset({"flash"}), frozenset({"math"}), frozenset({"flash"})):
        assert kernel_check.kernel_fault(SDPA, needs(kernels=kernels)) == f"{kernels}"
    monkeypatch.setattr(kernel_check, "find_fault", lambda backend, needs: needs.flash_impl)
    assert kernel_check.kernel_fault(TORCH_VARLEN, CUDA) is None
    assert kernel_check.kernel_fault(TORCH_VARLEN, needs(flash_impl="FA3")) == "FA3"


def test_what_pytorch_was_told_of_kernels(monkeypatch):
    """Read in every call: contexts and programs change it."""
    model = tiny_model("llama")
    handle = enable_prefix_sharing(model)

    def asked():
        model(input_ids=torch.tensor([[5, 6, 7], [5, 6, 8]]), use_cache=False)
        return patch_of(handle.backbones[0]).last.needs

    assert asked().flash_impl is None
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        assert asked().kernels == {"math", "efficient"}
    assert asked().kernels > {"math", "efficient"}
    monkeypatch.setattr(selection, "current_flash_attention_impl", lambda: "FA3")
    assert asked().flash_impl == "FA3"
