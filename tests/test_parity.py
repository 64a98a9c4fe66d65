"""Shared against unpatched: log-probs and gradients of every family and training mode."""

import pytest
import torch
from batches import (
    LayerTokens,
    assert_same_run,
    left_padded_with_positions,
    pad_rows,
    preference_batch,
    run,
)
from families import CHECKPOINTING, FAMILIES, NO_SDPA, set_checkpointing, tiny_model
from tiny_types import tiny_model_of

from hf_prefix_patch import enable_prefix_sharing


@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if a == "eager" or f not in NO_SDPA],
)
@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_logps_and_gradients_equal_the_unpatched_model(family, attention, mode, padding):
    model = tiny_model(family, attention)
    set_checkpointing(model, mode)
    batch = preference_batch(padding)
    want = run(model, batch)
    sharing = enable_prefix_sharing(model)
    seen = LayerTokens(model)
    got = run(model, batch)
    assert_same_run(got, want)
    packed = sharing.stats.packed_tokens
    assert packed < batch.attention_mask.sum()
    assert sharing.stats.calls == 1
    assert not sharing.stats.bypassed
    assert set(seen.shapes) == {(1, packed)}


@pytest.mark.needs(transformers=">=5")  # before, configs are no dataclasses to shrink
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode", "bert", "llama"])
def test_packed_rows_longer_than_the_positions_of_the_model(model_type):
    """Positions begin anew in each row, so a row that fits may be packed with any others."""
    names = {"gpt2": "n_positions", "gpt_bigcode": "n_positions"}
    model = tiny_model_of(model_type, **{names.get(model_type, "max_position_embeddings"): 24})
    model.train()
    batch = preference_batch()
    want = run(model, batch)
    with enable_prefix_sharing(model) as sharing:
        got = run(model, batch)
    assert batch.input_ids.shape[1] <= 24 < sharing.stats.packed_tokens
    assert_same_run(got, want, of_model=True)


def test_rows_longer_than_rotary_positions_run_as_unpatched():
    """Nothing ends there: the angles go on."""
    model, batch = tiny_model(max_position_embeddings=8), preference_batch()
    want = run(model, batch)
    with enable_prefix_sharing(model) as sharing:
        got = run(model, batch)
    assert_same_run(got, want)
    assert sharing.stats.calls == 1


def random_batch(seed):
    """1 to 7 ragged rows over a tiny vocabulary, so that rows share by chance, with duplicates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, n=1):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    rows = []
    for _ in range(*draw(1, 8)):
        (length,), (letters,), (kind,), (other,) = draw(2, 12), draw(1, 4), draw(0, 4), draw(0, 99)
        row = draw(3, 3 + letters, length)
        if rows and kind == 1:
            row = rows[other % len(rows)]  # a duplicate
        elif rows and kind == 2:
            row = rows[other % len(rows)] + row  # a continuation
        rows.append(row[:16])
    (style,), (extra,) = draw(0, 3), draw(0, 3)
    sides = [("left", "right", ("left", "right")[side])[style] for side in draw(0, 2, len(rows))]
    return pad_rows(rows, [1] * len(rows), sides, extra)


@pytest.mark.parametrize("block", range(6))
def test_random_ragged_batches(block):
    """300 batches in all; those with nothing to gain run as they are and must be equal too."""
    model = tiny_model(("llama", "mistral-window", "qwen3")[block % 3])
    for seed in range(50 * block, 50 * block + 50):
        batch = random_batch(seed)
        want = run(model, batch)
        with enable_prefix_sharing(model, verify=False) as sharing:
            got = run(model, batch)
        assert_same_run(got, want, of_model=True)
        stats = sharing.stats
        assert stats.calls == 1 or set(stats.bypassed) == {"nothing to gain"}


def test_random_batches_do_share():
    """The batches of the test above are no empty exercise: most of them share."""
    model = tiny_model()
    with enable_prefix_sharing(model, verify=False) as sharing:
        for seed in range(40):
            run(model, random_batch(seed))
    assert sharing.stats.calls > 25
    assert sharing.stats.sharing_ratio > 1.2


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_bf16_is_no_worse_than_the_unpatched_model(family):
    """Error to the fp32 truth at most twice that of the unpatched model in bf16."""
    truth_model = tiny_model(family)
    model = tiny_model(family).to(torch.bfloat16)
    truth_model.load_state_dict(model.float().state_dict())
    model.to(torch.bfloat16)
    assert_error_at_most_doubles(model, truth_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_autocast_is_no_worse_than_the_unpatched_model(family, dtype):
    truth_model, model = tiny_model(family), tiny_model(family)
    with torch.autocast("cpu", dtype):
        assert_error_at_most_doubles(model, truth_model)


def assert_error_at_most_doubles(model, truth_model, **options):
    """Root mean square errors of log-probs and of gradients, over eight batches."""
    errors = {"unpatched": [0.0, 0.0], "shared": [0.0, 0.0]}
    for seed in range(8):
        batch = preference_batch("right", seed)
        with torch.autocast("cpu", enabled=False):
            truth = run(truth_model, batch)
        for name, error in errors.items():
            if name == "shared":
                with enable_prefix_sharing(model, verify=False, **options) as sharing:
                    logps, grads = run(model, batch)
                assert sharing.stats.calls == 1
            else:
                logps, grads = run(model, batch)
            error[0] += (logps - truth[0]).square().sum().item()
            error[1] += sum((grads[n] - g).square().sum().item() for n, g in truth[1].items())
    for shared, unpatched in zip(errors["shared"], errors["unpatched"], strict=True):
        assert unpatched > 0
        assert shared**0.5 <= 2 * unpatched**0.5


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_hidden_states_and_router_logits_come_back_as_rows(family):
    model = tiny_model(family)
    batch = preference_batch()
    real = batch.attention_mask.bool()
    want = model(**batch.inputs, output_hidden_states=True)
    with enable_prefix_sharing(model):
        got = model(**batch.inputs, output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-4)
        assert not ours[~real].any()
    if family == "mixtral":
        for ours, theirs in zip(got.router_logits, want.router_logits, strict=True):
            assert ours.shape == theirs.shape
            at = real.reshape(-1)
            torch.testing.assert_close(ours[at], theirs[at], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.aux_loss, want.aux_loss)


def test_positions_given_by_the_caller():
    """Positions that count real tokens make rows share under left padding too."""
    model = tiny_model()
    batch, positions = left_padded_with_positions()
    want = run(model, batch, position_ids=positions)
    with enable_prefix_sharing(model) as sharing:
        run(model, batch)
        by_column = sharing.stats.packed_tokens
        got = run(model, batch, position_ids=positions)
    assert_same_run(got, want)
    assert sharing.stats.packed_tokens - by_column < by_column


def test_tuple_output():
    model = tiny_model()
    batch = preference_batch()
    want = model(**batch.inputs, use_cache=False, return_dict=False)
    with enable_prefix_sharing(model) as sharing:
        got = model(**batch.inputs, use_cache=False, return_dict=False)
        positional = model.model(batch.input_ids, batch.attention_mask, use_cache=False)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got[0][real], want[0][real], atol=1e-5, rtol=1e-4)
    assert positional.last_hidden_state.shape[:2] == batch.input_ids.shape
    assert sharing.stats.calls == 2


def test_no_attention_mask_means_every_token_is_real():
    model = tiny_model()
    ids = preference_batch().input_ids[:, :9]
    want = model(input_ids=ids).logits
    with enable_prefix_sharing(model) as sharing:
        torch.testing.assert_close(model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-4)
    assert sharing.stats.packed_tokens < ids.numel()
