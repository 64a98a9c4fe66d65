"""Completion log-probs: equal to those of full logits, and no prompt in the LM head."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event, current_thread, main_thread

import pytest
import torch
import transformers
from batches import LayerTokens, pad_rows
from families import FAMILIES, NO_SDPA, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    completion_logps,
    enable_prefix_sharing,
)
from hf_prefix_patch.logps import _compared

# One answer is empty.
pytestmark = pytest.mark.filterwarnings("ignore:a row has no completion token:UserWarning")

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [9, 11, 12]},
    {"prompt_ids": [5, 6, 12], "chosen_ids": [13], "rejected_ids": [14, 15, 16, 17]},
    {"prompt_ids": [], "chosen_ids": [18, 19], "rejected_ids": []},
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [9]},
]
COMPLETIONS = 2 + 1 + 1 + 2 + 3 + 4 + 0 + 1  # the first token of a row has no log-prob
DISTINCT = 2 + 1 + 1 + 2 + 4  # [9, 10] and the 9 after one prompt count once
LAYOUTS = ["rows", "packed"]


def collate(layout, pairs=PAIRS):
    return DataCollatorWithPrefixSharing(pad_token_id=0, layout=layout)(pairs)


def full_logps(model, pairs=PAIRS):
    """`[R]` sums and `[C]` single log-probs, by rows and all logits of an unpatched model."""
    answers = [(pair, name) for name in ("chosen_ids", "rejected_ids") for pair in pairs]
    rows = [pair["prompt_ids"] + pair[name] for pair, name in answers]
    batch = pad_rows(rows, [len(pair["prompt_ids"]) for pair, _ in answers], "right")
    ids, mask = batch.input_ids, batch.completion[:, 1:].bool()
    logits = model(**batch.inputs, use_cache=False).logits
    logps = logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logps * mask).sum(1), logps[mask]


def with_gradients(model, logps):
    """Log-probs, and gradients of a loss in which each row has a weight of its own."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(1.0, -0.7, len(logps), dtype=logps.dtype)
    (logps * weights).sum().backward()
    return logps.detach(), {
        name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None
    }


def assert_equal(got, want):
    torch.testing.assert_close(got[0].double(), want[0].double(), atol=2e-5, rtol=2e-5)
    assert got[1].keys() == want[1].keys()
    for name, x in want[1].items():
        error = (got[1][name] - x).abs().max() / x.abs().max().clamp(min=1e-12)
        assert error < 2e-5, f"{name}: {error:.1e}"


class HeadTokens:
    """Hidden states that reach the products with the head's weights."""

    def __init__(self, monkeypatch):
        self.counts = []
        original = torch.mm

        def mm(a, b, **options):
            self.counts.append(a.shape[0])
            return original(a, b, **options)

        monkeypatch.setattr("hf_prefix_patch.head.torch.mm", mm)


CHANGES = {
    "gemma2": {"final_logit_softcapping": 1.5},
    "mixtral": {"output_router_logits": True},
}


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family, layout, patched):
    """The decoder sees N tokens, the head the completions, sums and gradients are the same."""
    changes = CHANGES.get(family, {})
    model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa", **changes)
    want = with_gradients(model, full_logps(model)[0])
    batch = collate(layout)
    if not patched and layout == "packed":
        with pytest.raises(RuntimeError, match=r"the batch is a packed row, but .* does not share"):
            completion_logps(model, batch)
        return
    sharing = enable_prefix_sharing(model) if patched else None
    seen = LayerTokens(model)
    logps = completion_logps(model, batch)
    assert logps.dtype == torch.float32
    assert_equal(with_gradients(model, logps), want)
    tree = batch["input_ids"].prefix_tree
    assert seen.shapes[0] == (
        (1, tree.packed_tokens) if patched else (tree.num_rows, tree.row_length)
    )
    assert sharing is None or not sharing.stats.bypassed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_tokens(layout):
    model = tiny_model()
    _, want = full_logps(model)
    with enable_prefix_sharing(model):
        got = completion_logps(model, collate(layout), per_token=True)
    assert got.shape == (COMPLETIONS,)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layout", "tokens"), [("rows", COMPLETIONS), ("packed", DISTINCT)])
def test_prompts_never_meet_the_head(layout, tokens, monkeypatch):
    model = tiny_model()
    with enable_prefix_sharing(model):
        logits = []
        model.lm_head.register_forward_hook(lambda *args: logits.append(args[2].shape))
        completion_logps(model, collate(layout))  # once more than its logits: see below
        counts = HeadTokens(monkeypatch).counts
        logits.clear()
        with torch.no_grad():
            completion_logps(model, collate(layout))
    assert counts == [tokens]
    assert logits == [(1, 1, 50)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_by_a_disabled_adapter(layout):
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    with model.disable_adapter():
        reference = full_logps(model)[0]
    want = with_gradients(model, full_logps(model)[0])
    with enable_prefix_sharing(model):
        got = with_gradients(model, completion_logps(model, collate(layout)))
        with torch.no_grad(), model.disable_adapter():
            got_reference = completion_logps(model, collate(layout))
    assert_equal(got, want)
    torch.testing.assert_close(got_reference.double(), reference, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(want[0], reference, atol=1e-2)


HEADS = {
    "lora": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_with_an_adapter(layout, config):
    """Also more tokens than such a head is given at once."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=2, **config))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lm_head" in name and x.requires_grad:
                x += 0.1 * torch.randn_like(x)
    pairs = PAIRS + [
        {"prompt_ids": [i], "chosen_ids": [7, 8, 9] * 3, "rejected_ids": [8] * 10}
        for i in range(30, 40)
    ]
    want = with_gradients(model, full_logps(model, pairs)[0])
    with enable_prefix_sharing(model):
        got = with_gradients(model, completion_logps(model, collate(layout, pairs)))
    assert any("lm_head" in name for name in want[1])
    assert_equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_and_trained_weights(layout):
    model = tiny_model()
    for trained in ("lm_head", "layers.0", "embed_tokens"):
        for name, x in model.named_parameters():
            x.requires_grad_(trained in name)
        want = with_gradients(model, full_logps(model)[0])
        with enable_prefix_sharing(model):
            got = with_gradients(model, completion_logps(model, collate(layout)))
        assert want[1]
        assert_equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(layout, reentrant):
    model = tiny_model()
    want = with_gradients(model, full_logps(model)[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with enable_prefix_sharing(model):
        got = with_gradients(model, completion_logps(model, collate(layout)))
    assert_equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_no_worse_than_full_logits(layout):
    """Under autocast: error to the fp32 truth at most twice that of the unpatched model."""
    model = tiny_model()
    truth = full_logps(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        naive = full_logps(model)[0]
        with enable_prefix_sharing(model):
            got = completion_logps(model, collate(layout))
    assert got.dtype == torch.float32
    assert 0 < (got - truth).norm() <= 2 * (naive - truth).norm()


SCALES = {
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
}


@pytest.mark.parametrize(("name", "changes"), SCALES.values(), ids=SCALES)
def test_logit_scales(name, changes):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    want = with_gradients(model, full_logps(model)[0])
    with enable_prefix_sharing(model):
        assert_equal(with_gradients(model, completion_logps(model, collate("packed"))), want)


class _Odd(nn.Module):
    """A causal LM that changes its logits in a way of its own."""

    def __init__(self, model, change):
        super().__init__()
        forward = type(model).forward

        def changed(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = change(output.logits)
            return output

        model.forward = changed.__get__(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_that_the_config_does_not_tell_of(layout):
    model = tiny_model()
    with enable_prefix_sharing(model):
        _Odd(model, lambda x: x * 1.01)
        with pytest.raises(
            NotImplementedError, match=r"changes its logits after the LM head .* log"
        ):
            completion_logps(model, collate(layout))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("options", [{}, {"prepend": True}])
@pytest.mark.parametrize("where", ["head", "model", "adapter"])
def test_hooks_that_change_logits(where, options, in_place, later):
    """Registered before the first call or after it, on the head or on what it is in."""
    model = called = tiny_model()
    if where == "adapter":
        called = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    hooked = {"head": model.lm_head, "model": model, "adapter": called.base_model}[where]
    if later:
        completion_logps(called, collate("rows"))

    def cooled(module, args, output):
        logits = output if where == "head" else output.logits
        changed = logits.mul_(2) if in_place else logits * 2
        if where == "head":
            return changed
        output.logits = changed
        return output

    hook = hooked.register_forward_hook(cooled, **options)
    with (
        torch.set_grad_enabled(not in_place),
        pytest.raises(NotImplementedError, match=r"changes its logits .* or a hook does"),
    ):
        completion_logps(called, collate("rows"))
    hook.remove()
    got = completion_logps(called, collate("rows"))
    torch.testing.assert_close(got.double(), full_logps(model)[0], atol=2e-5, rtol=2e-5)


def test_hooks_that_look_or_cast():
    model = tiny_model()
    want, seen = full_logps(model)[0], []
    model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape))
    model.lm_head.register_forward_hook(lambda module, args, output: output.bfloat16())
    got = completion_logps(model, collate("rows"))
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    assert len(seen) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_the_logits_is_refused(layout):
    model = tiny_model()
    with enable_prefix_sharing(model), pytest.raises(ValueError, match="leave out logits_to_keep"):
        completion_logps(model, dict(collate(layout)) | {"logits_to_keep": 4})


def test_first_tokens_and_padding_are_no_completions():
    """Whatever the mask says: rows padded on the left, without a prompt, marked throughout."""
    model = tiny_model()
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 0, 0]])
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": real, "completion_mask": torch.ones_like(ids)}
    logps = model(input_ids=ids, attention_mask=real, use_cache=False).logits.log_softmax(-1)
    want = [logps[0, 2, 6] + logps[0, 3, 7], logps[1, 0, 9] + logps[1, 1, 10]]
    for sharing in (nullcontext(), enable_prefix_sharing(model)):
        with sharing:
            torch.testing.assert_close(completion_logps(model, batch), torch.stack(want))


def test_threads_take_turns_at_one_model():
    model = tiny_model()
    batch = collate("rows")
    want = completion_logps(model, batch)

    def work(_):
        return completion_logps(model, batch)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(work, range(16)):
            torch.testing.assert_close(got, want)


def test_other_threads_keep_their_logits():
    """One thread takes log-probs of the model, another its logits, for batches of one size."""
    model, batch = tiny_model(), collate("rows")
    with torch.no_grad():
        want, logits = completion_logps(model, batch), model(batch["input_ids"]).logits
    inside, done = Event(), Event()

    def wait(*_):
        if current_thread() is not main_thread():
            inside.set()
            assert done.wait(60)

    model.model.norm.register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(completion_logps, model, batch)
        assert inside.wait(60)
        got = model(batch["input_ids"]).logits
        done.set()
        torch.testing.assert_close(running.result(), want)
    torch.testing.assert_close(got, logits)


@pytest.mark.parametrize("change", [lambda x: torch.tanh(x / 30) * 30, lambda x: x * 1.02])
def test_caps_and_factors_show_while_logits_are_small(change):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 1e-3
    _Odd(model, change)
    with pytest.raises(NotImplementedError, match="changes its logits after the LM head"):
        completion_logps(model, collate("rows"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_cast_to_fp32_are_still_of_half_precision(dtype):
    """accelerate does so under mixed precision."""
    model = tiny_model()
    _Odd(model, lambda x: x.float())
    with torch.autocast("cpu", dtype):
        completion_logps(model, collate("rows"))


def test_a_head_that_is_not_called_is_noticed():
    model = tiny_model()
    backbone = model.base_model.forward

    def forward(input_ids, **kwargs):
        return backbone(input_ids)

    model.forward = forward
    with pytest.raises(RuntimeError, match="did not call its LM head as a module"):
        completion_logps(model, collate("rows"))


def test_nothing_stays_behind():
    model = tiny_model()
    batch = collate("rows")
    want = model(input_ids=batch["input_ids"], use_cache=False).logits
    completion_logps(model, batch)
    with pytest.raises((AttributeError, ValueError), match=r"get_seq_length|past_key_values"):
        completion_logps(model, batch | {"past_key_values": 3})
    assert not model._forward_hooks
    assert not model.lm_head._forward_pre_hooks
    assert torch.equal(model(input_ids=batch["input_ids"], use_cache=False).logits, want)


def test_a_batch_without_completions():
    model = tiny_model()
    batch = collate("rows", [{"prompt_ids": [5, 6], "chosen_ids": [], "rejected_ids": []}])
    logps = completion_logps(model, batch)
    assert logps.tolist() == [0.0, 0.0]
    logps.sum().backward()


def test_the_comparison_bears_overflow():
    """Hidden states are amplified for it, beyond what fp16 holds."""
    model = tiny_model().half()
    with torch.no_grad():
        model.lm_head.weight *= 200
    completion_logps(model, collate("rows"))
    _compared.clear()
    _Odd(model, lambda x: x * 1.1)
    with pytest.raises(NotImplementedError, match="changes its logits"):
        completion_logps(model, collate("rows"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_distributed(layout, compiled, one_process):
    """The gradients of a DDP model are reduced: they come through its own forward."""
    model = tiny_model()
    want = with_gradients(model, full_logps(model)[0])
    wrapped = DistributedDataParallel(model)
    reduced = []

    def note(state, bucket):
        reduced.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, note)
    called = torch.compile(wrapped, backend="eager") if compiled else wrapped
    with enable_prefix_sharing(called):
        got = with_gradients(model, completion_logps(called, collate(layout)))
    assert_equal(got, want)
    assert sum(reduced) == sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_model_runs_its_own_code(layout):
    """Compiled code has no room for a hook on the head: the module inside is called."""
    model = tiny_model()
    want = full_logps(model)[0]
    compiled = torch.compile(model, backend="eager")
    with enable_prefix_sharing(compiled):
        got = completion_logps(compiled, collate(layout))
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_was_compiled_in_place(layout, wrapped):
    """And has run; it is compiled again afterwards, its layers are all the time."""
    model = tiny_model()
    called = get_peft_model(model, LoraConfig(r=2)) if wrapped else model
    want = full_logps(model)[0]
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model.compile(backend=backend)
    model.model.layers[0].compile(backend="eager")
    before = model._compiled_call_impl, model.model.layers[0]._compiled_call_impl
    with torch.no_grad():
        called(input_ids=collate("rows")["input_ids"], use_cache=False)
    assert compiled
    with enable_prefix_sharing(called):
        got = completion_logps(called, collate(layout))
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    assert before == (model._compiled_call_impl, model.model.layers[0]._compiled_call_impl)
