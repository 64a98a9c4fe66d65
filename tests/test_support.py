"""Refusals at enable time, and bypasses that run exactly the original."""

import functools
import inspect
import pkgutil
import sys
import types

import pytest
import torch
import transformers
from batches import assert_same_run, pad_rows, preference_batch, run
from families import tiny_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.bypass import bypass_reason
from hf_prefix_patch.features import (
    is_known_attention,
    layer_types,
    rope_depends_on_length,
    sliding_window,
)
from hf_prefix_patch.support import check_peft
from hf_prefix_patch.versions import release

TRANSFORMERS_OWN = set(ALL_ATTENTION_FUNCTIONS.keys()) - {"prefix_sharing"}

_SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def build(name, **config):
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**config)
    )


def refused_models():
    bidirectional = tiny_model("gemma3", use_bidirectional_attention=True)
    noisy = tiny_model()
    noisy.get_input_embeddings().neftune_noise_alpha = 5.0
    unsloth = tiny_model()
    forward = types.FunctionType(
        (lambda self, x: x).__code__, {"__name__": "unsloth.models.llama"}, "fast_forward"
    )
    unsloth.model.layers[0].self_attn.forward = types.MethodType(
        forward, unsloth.model.layers[0].self_attn
    )
    normed = tiny_model()
    normed.model.layers[0].post_attention_layernorm = torch.nn.BatchNorm1d(32)
    t5 = transformers.T5Config(
        vocab_size=40, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2
    )
    chunked = {**_SMALL, "layer_types": ["chunked_attention", "full_attention"]}
    return {
        "encoder-decoder": (transformers.T5ForConditionalGeneration(t5), "an encoder-decoder"),
        "recurrent": (
            build("Mamba", vocab_size=40, hidden_size=16, num_hidden_layers=1),
            "recurrent",
        ),
        "layer type": (tiny_model("llama", **chunked), r"layers of type \['chunked_attention'\]"),
        "no registry": (
            build("Bloom", vocab_size=40, hidden_size=16, n_layer=1, n_head=2),
            "attention registry",
        ),
        "bidirectional": (bidirectional, "bidirectional attention"),
        "NEFTune": (noisy, "NEFTune noise"),
        "statistics": (normed, r"has layers \(BatchNorm1d\) that reckon with"),
        "Unsloth": (unsloth, r"patched by Unsloth \(LlamaAttention\)"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "encoder-decoder",
        "recurrent",
        "layer type",
        "no registry",
        "bidirectional",
        "NEFTune",
        "statistics",
        "Unsloth",
    ],
)
def test_refused_models(kind):
    """NotImplementedError that says what and why, and a model left as it was."""
    model, message = refused_models()[kind]
    with pytest.raises(NotImplementedError, match=message):
        enable_prefix_sharing(model)
    assert not model.base_model._forward_pre_hooks
    assert not hasattr(model.base_model, "_prefix_sharing")


@pytest.mark.parametrize("kind", ["POLY", "XLORA", "LILY", "SHADOW", "velora"])
def test_adapters_that_depend_on_the_batch_are_refused(kind):
    plain = {"peft_type": "LORA", "velora_config": None, "is_prompt_learning": False}
    changes = {"velora_config": object()} if kind == "velora" else {"peft_type": kind}
    check_peft(types.SimpleNamespace(peft_config={"a": types.SimpleNamespace(**plain)}))
    config = types.SimpleNamespace(**plain | changes)
    with pytest.raises(NotImplementedError, match=r"'a' .* depends on the rows"):
        check_peft(types.SimpleNamespace(peft_config={"a": config}))


def call(model, **changes):
    batch = preference_batch()
    with torch.no_grad():
        return model(**{**batch.inputs, "use_cache": False, **changes}).logits


def four_d_mask():
    mask = preference_batch().attention_mask
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    visible = causal & mask[:, None, None].bool()
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def holes():
    mask = preference_batch().attention_mask.clone()
    mask[0, 3] = 0
    return mask


BYPASSED = {
    "key/value cache": {"use_cache": True},
    "attention mask that is not [rows, length]": {"attention_mask": four_d_mask()},
    "attention mask of other values than 0 and 1": {
        "attention_mask": preference_batch().attention_mask * torch.arange(1, 16)
    },
    "attention mask with holes": {"attention_mask": holes()},
    "output_attentions": {"output_attentions": True},
    "inputs_embeds": {
        "input_ids": None,
        "inputs_embeds": torch.randn(4, 15, 32, generator=torch.Generator().manual_seed(0)),
    },
    "input 'token_type_ids'": {"token_type_ids": torch.zeros(4, 15, dtype=torch.long)},
    "position_ids that jump": {
        "attention_mask": None,
        "position_ids": torch.tensor([[*range(8), *range(1, 8)]]).expand(4, -1),
    },
    "position_ids that are not integers": {"position_ids": torch.arange(15.0)[None] / 2},
    "negative position_ids": {"position_ids": torch.arange(15)[None] - 3},
    "input 'is_causal'": {"is_causal": False},
    "input 'sliding_window'": {"sliding_window": 3},
}


@pytest.mark.parametrize("reason", BYPASSED)
def test_bypassed_calls_run_exactly_the_original(reason):
    attention = "eager" if reason == "output_attentions" else "sdpa"
    model = tiny_model(attention=attention)
    want = call(model, **BYPASSED[reason])
    with enable_prefix_sharing(model) as sharing:
        assert torch.equal(call(model, **BYPASSED[reason]), want)
        assert sharing.stats.bypassed == {reason: 1}
        call(model)
    assert sharing.stats.calls == 1


@pytest.mark.parametrize("name", ["logits_to_keep", "margin"])
def test_what_trainers_pass_through_the_stack(name):
    """For the head or the loss, and no reason to bypass; unless the stack reads it itself."""
    model, batch = tiny_model(), preference_batch()
    with torch.no_grad():
        want = model.model(**batch.inputs, use_cache=False).last_hidden_state
        with enable_prefix_sharing(model) as sharing:
            got = model.model(**batch.inputs, use_cache=False, **{name: torch.tensor(2)})
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got.last_hidden_state[real], want[real], atol=1e-5, rtol=1e-5)
    assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (1, 0)

    class Reads(type(model.model)):
        def forward(self, *args, logits_to_keep=0, margin=None, **kwargs):
            return super().forward(*args, **kwargs)

    inputs = {**batch.inputs, "use_cache": False, name: torch.tensor(2)}
    assert bypass_reason(Reads(model.config), inputs) == f"input {name!r}"


def test_positions_of_several_axes():
    """Three position ids a token (multimodal rotary embeddings): the hook leaves them alone."""
    backbone, batch = tiny_model().model, preference_batch()
    positions = torch.arange(15).expand(3, 4, 15)
    reason = bypass_reason(backbone, {**batch.inputs, "position_ids": positions})
    assert reason == "position_ids that are not [rows, length]"
    assert bypass_reason(backbone, {**batch.inputs, "position_ids": positions[0]}) is None


@pytest.mark.parametrize("name", ["output_attentions", "is_causal"])
def test_what_the_config_asks_for_after_enabling(name):
    model = tiny_model(attention="eager")
    with enable_prefix_sharing(model) as sharing:
        setattr(model.config, name, name == "output_attentions")
        got = call(model, output_attentions=None)
    assert torch.equal(got, call(model, output_attentions=None))
    reason = {"is_causal": "bidirectional attention"}.get(name, name)
    assert sharing.stats.bypassed == {reason: 1}


def test_rows_alike_but_nothing_to_gain():
    model = tiny_model()
    ids = torch.tensor([[3, 4, 5], [4, 5, 6]])
    want = call(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    with enable_prefix_sharing(model) as sharing:
        got = call(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(got, want)
    assert sharing.stats.bypassed == {"nothing to gain": 1}


def test_rows_without_a_real_token():
    model = tiny_model()
    nothing = torch.zeros(4, 15, dtype=torch.long)
    with enable_prefix_sharing(model) as sharing:
        call(model, attention_mask=nothing)
    assert sharing.stats.bypassed == {"no real token": 1}


def test_neftune_switched_on_later():
    """Noise in training is bypassed; in evaluation there is none, and rows are shared."""
    moved = release(transformers.__version__) >= (5, 0)
    home = "transformers.integrations.neftune" if moved else "transformers.trainer_utils"
    neftune_post_forward_hook = pkgutil.resolve_name(f"{home}:neftune_post_forward_hook")
    model = tiny_model()
    with enable_prefix_sharing(model) as sharing:
        embeddings = model.get_input_embeddings()
        embeddings.neftune_noise_alpha = 5.0
        hook = embeddings.register_forward_hook(neftune_post_forward_hook)
        torch.manual_seed(0)
        got = call(model)
        model.eval()
        call(model)
        assert (sharing.stats.bypassed, sharing.stats.calls) == ({"NEFTune": 1}, 1)
    torch.manual_seed(0)
    assert torch.equal(call(model.train()), got)
    hook.remove()


def test_context_parallel(monkeypatch):
    """Of accelerate, and of verl, in each process a part of every row."""
    from accelerate.state import AcceleratorState

    model = tiny_model()
    sizes_of_verl = iter([2, 1])
    ulysses = types.SimpleNamespace(
        get_ulysses_sequence_parallel_world_size=lambda: next(sizes_of_verl)
    )
    with enable_prefix_sharing(model) as sharing:
        for sizes in ({"cp_size": 2, "sp_size": 1}, {"cp_size": 1, "sp_size": 2}):
            plan = types.SimpleNamespace(**sizes)
            monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", plan)
            call(model)
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "verl.utils.ulysses", ulysses)
        call(model)
        call(model)
        monkeypatch.undo()
        call(model)
    assert sharing.stats.bypassed == {"context parallel": 3}
    assert sharing.stats.calls == 2


def test_context_parallel_of_pytorch(one_process):
    """Its context manager parts rows and exchanges the function that attention calls."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    model, ids = tiny_model().base_model, torch.arange(8)[None]
    mesh = init_device_mesh("cpu", (1,))
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
        assert bypass_reason(model, {"input_ids": ids}, False) == "context parallel"
    assert bypass_reason(model, {"input_ids": ids}, False) is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_depend_on_the_length(kind):
    """Padding beyond the longest row changes the frequencies of every row, so it is bypassed;
    the same rows without it share and are equal."""
    factors = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4} if kind == "longrope" else {}
    rope = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 12,
        **factors,
    }
    model = tiny_model("phi3" if factors else "llama", rope_parameters=rope).eval()
    rows = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8]]
    tight, wide = pad_rows(rows, [3, 3], "right"), pad_rows(rows, [3, 3], "right", extra=8)
    want = [model(**b.inputs, use_cache=False).logits for b in (tight, wide)]
    with enable_prefix_sharing(model) as sharing:
        got = [model(**b.inputs, use_cache=False).logits for b in (tight, wide)]
    real = tight.attention_mask.bool()
    torch.testing.assert_close(got[0][real], want[0][real], atol=1e-5, rtol=1e-4)
    assert torch.equal(got[1], want[1])
    assert sharing.stats.calls == 1
    assert sharing.stats.bypassed == {"rotary frequencies that depend on padding": 1}


def test_a_cache_that_is_given():
    """`past_key_values` to transformers before 5.24, where it is `cache`: known by either name."""
    model, ids = tiny_model(), preference_batch().input_ids
    names = {"past_key_values", "cache"} & inspect.signature(model.model.forward).parameters.keys()
    assert len(names) == 1

    def go_on(name):
        """The last two rows from their eighth token on, after the first seven of the others."""
        past = model(ids[:2, :7], use_cache=True).past_key_values
        return model(ids[2:, 7:], use_cache=False, **{name: past}).logits

    for name in names | {"past_key_values"}:
        want = go_on(name)
        with enable_prefix_sharing(model, on_bypass="ignore") as sharing:
            assert torch.equal(go_on(name), want)
        assert sharing.stats.bypassed == {"key/value cache": 2}


def test_cache_by_default_outside_training():
    """A plain evaluation call asks for a cache by default: exact, and said once."""
    model, batch = tiny_model().eval(), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        with pytest.warns(UserWarning, match="To share such a call, pass use_cache=False"):
            output = model(**batch.inputs)
        assert output.past_key_values is not None
        with torch.no_grad():
            model(**batch.inputs)  # warnings are errors here: it warned once
        assert sharing.stats.bypassed == {"key/value cache by default": 2}
        model(**batch.inputs, use_cache=False)
        assert sharing.stats.calls == 1
        model.train()(**batch.inputs)
        assert sharing.stats.calls == 2


def test_training_bypass_warns_once_a_reason():
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        with pytest.warns(UserWarning, match="bypassed: attention mask with holes"):
            model(input_ids=batch.input_ids, attention_mask=holes())
        model(input_ids=batch.input_ids, attention_mask=holes())
        with pytest.warns(UserWarning, match="bypassed: input 'token_type_ids'"):
            model(**batch.inputs, token_type_ids=torch.zeros_like(batch.input_ids))
    assert sharing.stats.bypassed.total() == 3


def test_bypass_may_be_ignored_or_raise():
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model, on_bypass="ignore"):
        model(input_ids=batch.input_ids, attention_mask=holes())
    with enable_prefix_sharing(model, on_bypass="raise") as sharing:
        with pytest.raises(RuntimeError, match="bypassed: attention mask with holes"):
            model(input_ids=batch.input_ids, attention_mask=holes())
        call(model, attention_mask=holes())  # not a training call
        ids = torch.tensor([[3, 4], [4, 3]])
        model(input_ids=ids)  # nothing to gain is no failure
    assert sharing.stats.bypassed["nothing to gain"] == 1


def test_training_that_shares_nothing_is_said_loudly():
    model = tiny_model()
    ids = torch.tensor([[3, 4, 5], [4, 5, 6]])
    with enable_prefix_sharing(model):
        for _ in range(7):
            model(input_ids=ids)
        with pytest.warns(UserWarning, match="first 8 training batches shared no token"):
            model(input_ids=ids)
        model(input_ids=ids)
    with enable_prefix_sharing(model):
        model(**preference_batch().inputs)
        for _ in range(9):
            model(input_ids=ids)
    with enable_prefix_sharing(model, on_bypass="ignore"):
        for _ in range(9):
            model(input_ids=ids)


def test_what_configs_say_about_layers():
    assert layer_types(tiny_model().config) == ["full_attention"] * 2
    assert layer_types(tiny_model("mistral-window").config) == ["sliding_attention"] * 2
    windowed = tiny_model("qwen2-window").config
    assert layer_types(windowed) == ["sliding_attention", "full_attention"]
    assert (sliding_window(windowed), sliding_window(tiny_model("qwen2").config)) == (5, None)
    assert not rope_depends_on_length(windowed)
    assert rope_depends_on_length(types.SimpleNamespace(rope_scaling={"type": "dynamic"}))
    nested = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}
    assert rope_depends_on_length(types.SimpleNamespace(rope_parameters=nested))


def test_trl_is_not_imported_by_the_library():
    code = "import hf_prefix_patch, sys; sys.exit('trl' in sys.modules or 'peft' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def halved():
    """The name of an attention function of the user's own."""

    def attend(*args, scaling=None, **kwargs):
        return sdpa_attention_forward(*args, scaling=scaling / 2, **kwargs)

    transformers.AttentionInterface.register("halved", attend)
    transformers.AttentionMaskInterface.register("halved", sdpa_mask)
    yield "halved"
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        del interface._global_mapping["halved"]


def test_attention_functions_of_the_users_own(halved):
    """Shared attention would stand in their place."""
    with pytest.raises(NotImplementedError, match=r"attends by 'halved', a function that was reg"):
        enable_prefix_sharing(tiny_model(attention=halved))


@pytest.mark.needs(transformers=">=4.54")  # before, it is set once
def test_attention_functions_that_are_set_later(halved):
    """Bypassed, and equal."""
    model, batch = tiny_model(), preference_batch()
    before = run(model, batch)
    with enable_prefix_sharing(model) as sharing:
        model.set_attn_implementation(halved)
        with pytest.warns(UserWarning, match=r"bypassed: attention function 'halved'.* load the"):
            got = run(model, batch)
    assert_same_run(got, run(model, batch))
    assert not torch.allclose(got[0], before[0], atol=1e-2)
    assert sharing.stats.calls == 0


def test_attention_functions_that_are_known(monkeypatch):
    """transformers' own, flash kernels of the hub, and what is not registered at all."""
    functions = dict.fromkeys(("mine", "my_flash", "org/flash-attn", "org/other"), len)
    for name, function in functions.items():
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, function)
    assert all(map(is_known_attention, ["eager", "org/flash-attn", *TRANSFORMERS_OWN]))
    assert not any(map(is_known_attention, ["mine", "my_flash", "org/other"]))


def written_in(module, wraps=None, **names):
    """A function that no test calls, of that module."""
    function = types.FunctionType((lambda: None).__code__, {"__name__": module, **names})
    return function if wraps is None else functools.update_wrapper(function, wraps)


@pytest.mark.parametrize(
    ("module", "known"), [("transformers.x", True), ("verl.models", True), ("another", False)]
)
def test_what_flash_attention_calls_exchanged(monkeypatch, module, known):
    """By libraries that split rows over processes; verl's leaves it to transformers' if it does
    not, and is asked about that in each call."""
    flash = transformers.integrations.flash_attention
    inner = transformers.modeling_flash_attention_utils
    original = flash._flash_attention_forward
    kernel = functools.partial(flash.flash_attention_forward, implementation="org/flash-attn")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "org/flash-attn", kernel)
    exchanged = written_in(module, wraps=original)
    compiled = functools.partial(torch.compile, backend="eager")
    around = functools.partial, torch.compiler.disable, compiled
    cases = [(flash, exchanged), (inner, exchanged), *((flash, wrap(exchanged)) for wrap in around)]
    for place, function in cases:
        monkeypatch.setattr(flash, "_flash_attention_forward", original)
        monkeypatch.setattr(place, "_flash_attention_forward", function)
        assert is_known_attention("flash_attention_2") is known
        assert is_known_attention("org/flash-attn") is known
        assert is_known_attention("sdpa")
    own = written_in("mine", _flash_attention_forward=original)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", own)
    assert not is_known_attention("mine")
