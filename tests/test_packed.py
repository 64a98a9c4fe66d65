"""Calls that are given a packed row: equal to those with rows, and never run as one long row."""

import pytest
import torch
from batches import LayerTokens, assert_same_run, gradients, preference_batch, run
from families import FAMILIES, NO_SDPA, tiny_model
from transformers import AttentionInterface

from hf_prefix_patch import DataCollatorWithPrefixSharing, PrefixTree, enable_prefix_sharing
from hf_prefix_patch.planned import PackedRow

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [9, 11, 12]},
    {"prompt_ids": [5, 6, 12], "chosen_ids": [13], "rejected_ids": [14, 15, 16, 17]},
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [9]},
]
packed_batch = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")
EXPERTS_OFF = {"output_router_logits": False}


def by_hand(rows):
    """A packed row and its descriptors from `PrefixTree`, all plain tensors."""
    tree = PrefixTree.from_rows(rows.input_ids, rows.attention_mask)
    return tree, {"input_ids": tree.pack(rows.input_ids), **tree.model_kwargs()}


def run_packed(model, tree, inputs, rows, **options):
    """As `run` of the rows, with logits and loss taken from the packed row."""
    model.zero_grad(set_to_none=True)
    logits = tree.unpack(model(**inputs, **options).logits)
    logps = logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(2, rows.input_ids[:, 1:, None])[..., 0]
    logps = (logps * rows.completion[:, 1:]).sum(1)
    (logps * torch.linspace(1.0, -0.7, len(logps))).sum().backward()
    return logps.detach(), gradients(model)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family, checkpointing):
    model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa", **EXPERTS_OFF)
    rows = preference_batch()
    want = run(model, rows)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    tree, inputs = by_hand(rows)
    with enable_prefix_sharing(model) as sharing:
        seen = LayerTokens(model)
        got = run_packed(model, tree, inputs, rows)
    assert_same_run(got, want)
    assert set(seen.shapes) == {(1, tree.packed_tokens)}
    assert sharing.stats.packed_tokens == tree.packed_tokens
    assert sharing.stats.calls == 1


def test_batches_of_the_collator():
    model = tiny_model()
    batch = packed_batch(PAIRS)
    tree = batch["input_ids"].prefix_tree
    rows = DataCollatorWithPrefixSharing(pad_token_id=0)(PAIRS)
    mask = rows["attention_mask"].bool()
    want = model(input_ids=rows["input_ids"].clone(), attention_mask=mask.long()).logits
    model.eval()
    with enable_prefix_sharing(model) as sharing:
        seen = LayerTokens(model)
        got = model(**batch).logits
        kept = model(**batch, logits_to_keep=batch["logit_index"]).logits
        model(**batch.to("cpu"), use_cache=False)
    torch.testing.assert_close(tree.unpack(got)[mask], want[mask])
    torch.testing.assert_close(kept, got[:, batch["logit_index"]])
    assert seen.shapes == 3 * [(1, tree.packed_tokens)]
    assert (sharing.stats.row_tokens, sharing.stats.calls) == (3 * tree.row_tokens, 3)
    assert not sharing.stats.bypassed


def test_a_batch_without_anything_to_share():
    pair = {"prompt_ids": [], "chosen_ids": [5, 6], "rejected_ids": [7, 8]}
    batch = packed_batch([pair])
    model = tiny_model()
    want = model(input_ids=torch.tensor([[5, 6], [7, 8]])).logits
    with enable_prefix_sharing(model) as sharing:
        got = model(**batch).logits
    torch.testing.assert_close(got.view(2, 2, -1), want)
    assert sharing.stats.calls == 1


def test_descriptors_alone_are_enough():
    """The row of the collator where its plan was lost, as when it was copied."""
    model = tiny_model()
    batch = packed_batch(PAIRS)
    with enable_prefix_sharing(model) as sharing:
        want = model(**batch).logits
        batch["input_ids"] = batch["input_ids"].clone()
        assert type(batch["input_ids"]) is torch.Tensor
        got = model(**batch).logits
    assert torch.equal(got, want)
    assert sharing.stats.calls == 2


@pytest.mark.parametrize("plan", ["kept", "lost"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_unpatched_model_fails(attention, plan):
    model = tiny_model(attention=attention)
    batch = packed_batch(PAIRS)
    if plan == "lost":
        batch["input_ids"] = batch["input_ids"].clone()
        with pytest.raises(RuntimeError):
            model(**batch)
        return
    with pytest.raises(
        RuntimeError, match=r"packed row .* call enable_prefix_sharing\(model\) fir"
    ):
        model(**batch)
    with enable_prefix_sharing(model):
        model(**batch)
    with pytest.raises(RuntimeError, match="does not share prefixes"):
        model(**batch)


def test_flash_attention_would_fail_too(monkeypatch):
    """Attention that takes the mask for a padding mask meets one of no size."""

    def flash(module, query, key, value, attention_mask, **kwargs):
        rows = attention_mask[:, -key.shape[2] :]
        return (query.transpose(1, 2) * rows.reshape(query.shape[0], key.shape[2], 1, 1)), None

    AttentionInterface.register("masked", flash)
    batch = packed_batch(PAIRS)
    batch["input_ids"] = batch["input_ids"].clone()
    with pytest.raises(RuntimeError):
        tiny_model(attention="masked")(**batch)


BAD = {
    "positions": (
        lambda x: {"position_ids": x["position_ids"][:, :-1]},
        "do not describe a packed",
    ),
    "boundaries": (lambda x: {"tree_cu_seqlens_q": x["tree_cu_seqlens_q"][:-1]}, "do not describe"),
    "other keys": (
        lambda x: {"tree_kv_index": x["tree_kv_index"].flip(0)},
        "do not describe a pack",
    ),
    "later keys": (lambda x: {"tree_kv_index": x["tree_kv_index"] + 1}, "do not describe a packed"),
    "attentions": (lambda x: {"output_attentions": True}, "cannot run with: output_attentions"),
    "embeddings": (lambda x: {"inputs_embeds": torch.zeros(1, 14, 32)}, "with: inputs_embeds"),
    "experts": (
        lambda x: {"output_router_logits": True},
        r"auxiliary loss .*output_router_logits=F",
    ),
    "unknown": (
        lambda x: {"token_type_ids": x["input_ids"]},
        "input 'token_type_ids'; leave it out",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_calls(change, message):
    model = tiny_model("mixtral", **EXPERTS_OFF)
    batch = dict(packed_batch(PAIRS))
    batch["input_ids"] = batch["input_ids"].clone()
    with enable_prefix_sharing(model):
        model(**batch)
        call = batch | change(batch)
        with pytest.raises(ValueError, match=message):
            model.base_model(**call)
        model(**batch)


def test_changed_descriptors_count():
    """A plan that came with the row is used with its own descriptors and positions only."""
    model = tiny_model()
    batch = packed_batch(PAIRS)
    with enable_prefix_sharing(model):
        before = model(**batch).logits
        got = model(**(dict(batch) | {"position_ids": batch["position_ids"] + 7})).logits
        assert not torch.equal(got, before)
        with pytest.raises(ValueError, match="do not describe a packed row"):
            model(**(dict(batch) | {"tree_kv_index": batch["tree_kv_index"].flip(0)}))


def test_a_packed_row_is_looked_at_freely():
    ids = packed_batch(PAIRS)["input_ids"]
    assert isinstance(ids, PackedRow)
    assert ids.shape == (1, ids.prefix_tree.packed_tokens)
    assert ids.tolist()[0][:3] == [5, 6, 7]
    assert (ids > 4).all()
