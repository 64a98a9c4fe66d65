"""Batches at the edge: poison in the padding, one row, many, long ones, deep ones; and every way to
ask for a gradient, or for none."""

import time

import pytest
import torch
from batches import (
    LayerTokens,
    assert_same_run,
    completion_logps,
    gradients,
    logits_of,
    pad_rows,
    preference_batch,
    run,
)
from composites import tiny_composite
from families import tiny_model
from torch.autograd import forward_ad

from hf_prefix_patch import PrefixTree, enable_prefix_sharing
from hf_prefix_patch.backends.flex import tree_block_mask
from hf_prefix_patch.backends.sdpa import SDPA
from hf_prefix_patch.backends.varlen import TORCH_VARLEN
from hf_prefix_patch.kernel_check import Needs
from hf_prefix_patch.wrappers import backbone_of

WEIGHTS = torch.linspace(1.0, -0.7, 4)
POISON = [float("nan"), float("inf"), 1e30]


# Padding


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("make", [tiny_model, tiny_composite])
def test_what_padding_is_embedded_as_reaches_nothing(make, padding, poison):
    """The embedding of the padding token is poison: log-probs and gradients are those of a model in
    which it is not. The unpatched model multiplies it by a weight of zero, which is NaN."""
    model, batch = make(), preference_batch(padding)
    want = run(model, batch)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[0] = poison
    spoilt = any(x.isnan().any() for x in [run(model, batch)[0], *gradients(model).values()])
    assert spoilt or poison == 1e30
    with enable_prefix_sharing(model) as sharing:
        got = run(model, batch)
    assert sharing.stats.calls == 1
    assert_same_run(got, want)


@pytest.mark.parametrize("poison", [-100, 2**31 - 1, 49])
def test_ids_under_padding_may_be_anything(poison):
    """Even ids that have no embedding, which an unpatched model cannot be given."""
    model, batch = tiny_model(), preference_batch()
    want = run(model, batch)
    ids = batch.input_ids.masked_fill(batch.attention_mask == 0, poison)
    with enable_prefix_sharing(model) as sharing:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=ids, attention_mask=batch.attention_mask).logits
        logps = completion_logps(logits, batch)
        (logps * WEIGHTS).sum().backward()
    assert_same_run((logps.detach(), gradients(model)), want)
    assert sharing.stats.calls == 1


@pytest.mark.parametrize("poison", POISON)
def test_gradients_from_padding_go_nowhere(poison):
    """A loss whose gradient at padded positions is poison, as that of NaN logits under a mask."""
    model, batch = tiny_model(), preference_batch()
    real = batch.attention_mask.bool()
    direction = torch.randn(*real.shape, 32)
    results = []
    with enable_prefix_sharing(model):
        for filling in (0.0, poison):
            model.zero_grad(set_to_none=True)
            hidden = model.model(**batch.inputs).last_hidden_state
            assert not hidden[~real].any()
            hidden.backward(direction.masked_fill(~real[..., None], filling))
            results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(x, results[0][name]) for name, x in results[1].items())


# Sizes


def parity(rows, prompts, family="llama", *, tokens, **options):
    """Log-probs and gradients with and without sharing, which runs on so many packed tokens."""
    model = tiny_model(family)
    batch = pad_rows(rows, prompts, "right", **options)
    want = run(model, batch)
    with enable_prefix_sharing(model, verify=False) as sharing:
        seen = LayerTokens(model)
        got = run(model, batch)
    assert_same_run(got, want, of_model=True)
    assert seen.shapes == [(1, tokens)]
    assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (1, 0)


def drawn(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 50, sizes, generator=generator).tolist()


def test_one_row():
    parity([drawn(9)], [4], tokens=9, extra=3)


def test_one_row_without_padding_has_nothing_to_gain():
    model, ids = tiny_model(), torch.tensor([drawn(9)])
    want = model(input_ids=ids).logits
    with enable_prefix_sharing(model) as sharing:
        assert torch.equal(model(input_ids=ids).logits, want)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (0, {"nothing to gain": 1})


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_512_rows(family):
    """64 answers to each of 8 prompts."""
    prompts = drawn(8, 12)
    rows = [prompts[r % 8] + drawn(1 + r % 7, seed=r) for r in range(512)]
    distinct = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    parity(rows, [12] * 512, family, tokens=len(distinct))


def test_rows_of_one_token():
    model, ids = tiny_model(), torch.tensor([[5], [6], [5], [5]])
    want = model(input_ids=ids).logits
    with enable_prefix_sharing(model) as sharing:
        torch.testing.assert_close(model(input_ids=ids).logits, want)
    assert (sharing.stats.calls, sharing.stats.packed_tokens) == (1, 2)


def test_4096_identical_rows():
    row = drawn(12)
    tree = PrefixTree.from_rows([row] * 4096)
    assert (tree.packed_tokens, tree.row_tokens, tree.parents) == (12, 4096 * 12, (-1,))
    parity([row] * 4096, [6] * 4096, tokens=12)


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_a_chain_of_prefixes(family):
    """Each row goes on from the one before: as many segments as rows, each the only child."""
    row = drawn(90)
    rows = [row[: i + 1] for i in range(90)][::-1]
    parity(rows, [0] * 90, family, tokens=90)


def test_a_deep_chain_that_branches():
    """600 levels, at each of which a row leaves: a path of every length, planned in a moment."""
    row, length = drawn(600), 601
    rows = [[*row[:i], 60, *[0] * (length - i - 1)] for i in range(600)]
    mask = [[1] * (i + 1) + [0] * (length - i - 1) for i in range(600)]
    start = time.process_time()
    tree = PrefixTree.from_rows(rows, mask)
    plans = SDPA.plan(tree, None)["tree_blocks"]
    assert time.process_time() - start < 5
    assert tree.packed_tokens == 599 + 600
    assert max(tree.path_lengths) == 600
    assert len(plans) > 4 * 600


def test_a_prompt_of_100_000_tokens():
    """Planned for every backend in seconds, with no table of all tokens against all."""
    prompt = torch.randint(3, 50_000, (100_000,))
    rows = torch.stack([torch.cat([prompt, torch.arange(500) + r]) for r in range(2)])
    needs = Needs(
        torch.device("cpu"),
        torch.float32,
        "sdpa",
        frozenset({64}),
        frozenset({None, 4096}),
        frozenset({"window"}),
    )
    start = time.process_time()
    tree = PrefixTree.from_rows(rows, torch.ones_like(rows))
    plans = [backend.plan(tree, needs) for backend in (SDPA, TORCH_VARLEN)]
    masks = [tree_block_mask(tree, window, needs.device) for window in needs.windows]
    assert time.process_time() - start < 10
    assert tree.packed_tokens == 101_000
    assert len(tree.kv_index) == 100_000 + 2 * 100_500
    chains = plans[1]["tree_chains"]
    assert chains[None]["num_keys"] == 100_500 * 2
    assert chains[4096]["num_keys"] == 100_500 + 500 + 4096
    assert all(mask.kv_indices.numel() == (-(-101_000 // 128)) ** 2 for mask in masks)
    assert torch.equal(tree.unpack(tree.pack(rows)), rows)


# Gradients


def shared_run(model, batch, backward):
    """Log-probs and gradients of what `backward` makes of the loss, shared and then unpatched."""
    results = []
    for sharing in (True, False):
        handle = enable_prefix_sharing(model) if sharing else None
        model.zero_grad(set_to_none=True)
        logps = completion_logps(model(**batch.inputs).logits, batch)
        backward((logps * WEIGHTS).sum())
        results.append((logps.detach(), gradients(model)))
        if handle is not None:
            assert handle.stats.calls == 1
            handle.remove()
    return results


def test_backward_twice():
    def backward(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    model, batch = tiny_model(), preference_batch()
    assert_same_run(*shared_run(model, batch, backward))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_gradients(attention):
    """A penalty on a gradient: as unpatched with attention that can be differentiated twice."""
    model, batch = tiny_model(attention=attention), preference_batch()

    def backward(loss):
        gradient = torch.autograd.grad(loss, model.model.norm.weight, create_graph=True)[0]
        gradient.square().sum().backward()

    assert_same_run(*shared_run(model, batch, backward))


def test_gradients_of_gradients_of_attention_are_not_silently_wrong():
    """Where a kernel has none, its own error."""
    model, batch = tiny_model(), preference_batch()
    weight = model.model.layers[0].self_attn.q_proj.weight

    def backward(loss):
        gradient = torch.autograd.grad(loss, weight, create_graph=True)[0]
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match=r"does not require grad|not implemented|no autograd"):
        shared_run(model, batch, backward)


def test_anomaly_detection():
    model, batch = tiny_model(), preference_batch()
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        assert_same_run(*shared_run(model, batch, torch.Tensor.backward))


def test_what_requires_a_gradient_may_change_between_calls():
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model) as sharing:
        for frozen in ("embed_tokens", "layers.0", "self_attn", "norm", "lm_head"):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen not in name)
            run(model, batch)
            got = gradients(model)
            assert {frozen in name for name in got} == {False}
            model.requires_grad_(True)
            everything = run(model, batch)[1]
            for name, x in got.items():
                torch.testing.assert_close(x, everything[name])
    assert not sharing.stats.bypassed


def test_training_evaluation_and_back():
    """Flags that flip between forward and backward, too."""
    model, batch = tiny_model(), preference_batch()
    real, want = batch.attention_mask.bool(), logits_of(model, batch)

    def backward(loss):
        model.eval()
        loss.backward()
        model.train()

    assert_same_run(*shared_run(model, batch, backward))
    with enable_prefix_sharing(model) as sharing:
        for mode in (True, False, True):
            model.train(mode)
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    got = model(**batch.inputs, use_cache=False).logits
                assert not got.requires_grad
                torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-4)
    assert sharing.stats.calls == 6


@pytest.mark.parametrize("transform", ["grad", "vmap", "tangents"])
def test_function_transformations_run_as_they_are(transform):
    model, batch = tiny_model(attention="eager"), preference_batch()
    weights = {name: x.detach() for name, x in model.named_parameters()}

    def loss(weights):
        logits = torch.func.functional_call(model, weights, (), batch.inputs).logits
        return completion_logps(logits, batch).sum()

    def tangent():
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(x, 0.1 * x) for name, x in weights.items()}
            return forward_ad.unpack_dual(loss(dual)).tangent

    stacked = {name: torch.stack([x, 1.1 * x]) for name, x in weights.items()}
    call = {
        "grad": lambda: torch.func.grad(loss)(weights)["lm_head.weight"],
        "vmap": lambda: torch.func.vmap(loss)(stacked),
        "tangents": tangent,
    }[transform]
    want = call()
    with enable_prefix_sharing(model) as sharing:
        with pytest.warns(UserWarning, match=r"bypassed: a torch.func transformation"):
            got = call()
        run(model, batch)
    assert torch.equal(got, want)
    assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (1, 1)


@pytest.mark.parametrize("when", ["in a call", "before backward"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_removed_too_early(when, attention):
    """In the middle of a call, or when layers are still to run again: an error and no wrong number,
    and after it the model as it was."""
    model, batch = tiny_model(attention=attention), preference_batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    want = run(model, batch)
    sharing = enable_prefix_sharing(model)
    if when == "in a call":
        hook = model.model.layers[0].register_forward_hook(lambda *_: sharing.remove())
        with pytest.raises(RuntimeError, match=r"size|shape"):
            model(**batch.inputs)
        hook.remove()
    else:
        loss = model(**batch.inputs).logits.square().sum()
        sharing.remove()
        with pytest.raises(RuntimeError, match="removed between a forward and its backward"):
            loss.backward()
    assert not backbone_of(model)._forward_pre_hooks
    got = run(model, batch)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(x, want[1][name]) for name, x in got[1].items())


def test_hooks_that_add_a_value_for_each_row():
    """It would be broadcast over the packed row: said, wherever it comes."""
    model, batch = tiny_model(), preference_batch()
    by_row = torch.ones(4, 1, 32)

    def steer(layer, args, output):
        return (output[0] + by_row, *output[1:]) if isinstance(output, tuple) else output + by_row

    for layer, name in ((0, "LlamaAttention"), (1, "LlamaModel")):
        hook = model.model.layers[layer].register_forward_hook(steer)
        with enable_prefix_sharing(model, verify=False):
            message = rf"{name} has a tensor of shape \[4, .* in a call on a packed row"
            with pytest.raises(RuntimeError, match=message):
                run(model, batch)
        hook.remove()


def test_hooks_on_the_stack_see_rows():
    """Whenever they were registered: value heads, and what keeps hidden states. They see the
    arguments of the call as well, which say where a row ends."""
    model, batch = tiny_model(), preference_batch()
    seen = []

    def keep(stack, args, kwargs, output):
        seen.append((output[0].detach(), args, kwargs))

    with torch.no_grad():
        model.model.register_forward_hook(keep, with_kwargs=True)
        model(**batch.inputs, use_cache=False)
        with enable_prefix_sharing(model) as sharing:
            model.model.register_forward_hook(keep, with_kwargs=True)
            seen[1:] = []  # of verification
            model(**batch.inputs, use_cache=False)
    assert sharing.stats.calls == 1
    assert len(seen) == 3
    real = batch.attention_mask.bool()
    want, *others = seen
    for got in others:
        torch.testing.assert_close(got[0][real], want[0][real], atol=1e-5, rtol=1e-4)
        assert got[1:] == want[1:]
        assert got[2]["input_ids"] is batch.inputs["input_ids"]


def test_a_tensor_that_is_returned_twice_stays_one():
    model, batch = tiny_model().model, preference_batch()
    with enable_prefix_sharing(model) as sharing:
        output = model(**batch.inputs, use_cache=False, output_hidden_states=True)
    assert sharing.stats.calls == 1
    assert output.hidden_states[-1] is output.last_hidden_state
    assert output.hidden_states[0] is not output.hidden_states[1]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("way", ["trace", "export"])
def test_what_is_traced_serves_other_batches(way):
    """A plan belongs to one batch, so such a call runs as it is."""
    model, batch = tiny_model().eval(), preference_batch()
    example = batch.input_ids, torch.ones_like(batch.attention_mask)
    other = torch.randint(3, 50, batch.input_ids.shape), example[1]
    with torch.no_grad():
        want = Logits(model)(*other)
        with enable_prefix_sharing(model) as sharing:
            if way == "trace":
                traced = torch.jit.trace(Logits(model), example, check_trace=False)
            else:
                traced = torch.export.export(Logits(model), example, strict=False).module()
        got = traced(*other)
    torch.testing.assert_close(got, want)
    assert sharing.stats.calls == 0
    assert sharing.stats.bypassed["tracing or export"] >= 1
