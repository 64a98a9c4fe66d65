"""The sdpa backend against attention on duplicated rows, and the delegation without descriptors."""

import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import batches
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hf_prefix_patch import PrefixTree, enable_prefix_sharing
from hf_prefix_patch.attention import prefix_sharing_attention, sdpa_attend, sdpa_plan
from hf_prefix_patch.reference import duplicated_rows_attention


def qkv(tree, heads=4, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, tree.packed_tokens, 8) for n in (heads, kv_heads, kv_heads)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def attend(tree, inputs, **options):
    settled = {"dropout": 0.0, "sliding_window": None, "softcap": None, **options}
    return sdpa_attend(*inputs, scaling=0.3, **settled, **sdpa_plan(tree))


def assert_equals_duplicated_rows(tree, **options):
    inputs = qkv(tree)
    got = attend(tree, inputs, **options)
    want = duplicated_rows_attention(tree, *inputs, scaling=0.3, **options)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    direction = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, direction),
        torch.autograd.grad(want, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@given(batches(), st.sampled_from([None, 1, 2, 3, 5]), st.sampled_from([None, 1.5]))
@settings(deadline=None, max_examples=150)
def test_equals_duplicated_rows(batch, window, softcap):
    """Output and gradients in fp64, any tree, windows and soft caps."""
    tree = PrefixTree.from_rows(*batch)
    assert_equals_duplicated_rows(tree, sliding_window=window, softcap=softcap)


@pytest.mark.parametrize("prefix", [1, 6, 40])
@pytest.mark.parametrize("window", [None, 4, 30])
def test_short_and_long_prefixes(prefix, window):
    """Both ways to align a segment with the keys ahead of it, and the cut to the window."""
    start = list(range(prefix))
    rows = [start + [100] * 12, start + [101] * 12]
    assert_equals_duplicated_rows(PrefixTree.from_rows(rows), sliding_window=window)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_keeps_the_mean(softcap):
    """Attention weights are dropped at the given rate and scaled up: the mean stays."""
    tree = PrefixTree.from_rows([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]])
    inputs = [x.detach() for x in qkv(tree)]
    plain = attend(tree, inputs, softcap=softcap)
    torch.manual_seed(0)
    draws = [attend(tree, inputs, softcap=softcap, dropout=0.5) for _ in range(4000)]
    assert not torch.allclose(draws[0], draws[1])
    torch.testing.assert_close(torch.stack(draws).mean(0), plain, atol=0.12, rtol=0)


def test_model_dropout_reaches_shared_attention():
    """In training mode with attention_dropout the shared forward is random, in eval it is not."""
    model = tiny_model(attention_dropout=0.5)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with enable_prefix_sharing(model) as sharing:
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        first, second = (model(ids, use_cache=False).logits for _ in range(2))
        assert torch.equal(first, second)
    assert sharing.stats.calls == 4


@pytest.mark.parametrize("feature", ["s_aux", "sinks", "position_bias", "indices"])
def test_features_that_no_backend_serves_are_refused(feature):
    module = tiny_model().model.layers[0].self_attn
    tree = PrefixTree.from_rows([[1, 2], [1, 3]])
    with pytest.raises(NotImplementedError, match=f"passes '{feature}'"):
        prefix_sharing_attention(
            module,
            *qkv(tree),
            None,
            tree_attend=sdpa_attend,
            **sdpa_plan(tree),
            **{feature: torch.ones(1)},
        )


def test_a_mask_made_by_the_layer_is_refused():
    """A layer that adds a bias of its own to the mask would lose it."""
    module = tiny_model().model.layers[0].self_attn
    tree = PrefixTree.from_rows([[1, 2], [1, 3]])
    with pytest.raises(NotImplementedError, match=r"mask of its own, of shape \[1, 4, 3, 3\]"):
        prefix_sharing_attention(
            module,
            *qkv(tree),
            torch.zeros(1, 4, 3, 3),
            tree_attend=sdpa_attend,
            **sdpa_plan(tree),
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_calls_without_descriptors_are_those_of_the_model(attention):
    model = tiny_model(attention=attention).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    want = model(ids, use_cache=True)
    with enable_prefix_sharing(model) as sharing:
        got = model(ids, use_cache=True)
    assert torch.equal(got.logits, want.logits)
    assert sharing.stats.calls == 0


def test_other_implementations_see_the_config_that_names_them():
    """transformers' flash wrapper reads the implementation from the module's config."""
    seen = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.layer_idx))
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model = tiny_model(attention="recording").eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    want = model(ids, use_cache=True).logits
    seen.clear()
    with enable_prefix_sharing(model, verify=False):
        assert torch.equal(model(ids, use_cache=True).logits, want)
    assert seen == [("recording", 0), ("recording", 1)]


def test_the_implementation_may_change_while_patched():
    model = tiny_model().eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with enable_prefix_sharing(model):
        model.set_attn_implementation("eager")
        got = model(ids, use_cache=True).logits
    assert torch.equal(got, tiny_model(attention="eager").eval()(ids, use_cache=True).logits)
