"""Several documents in one row, told apart by their positions alone: padding-free batches."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from batches import (
    LayerTokens,
    assert_same_run,
    boundaries,
    documents,
    pad_rows,
    preference_batch,
    rows_of_documents,
    run,
    tree_of_rows,
)
from composites import image_batch, tiny_composite
from families import CHECKPOINTING, FAMILIES, HYBRIDS, NO_SDPA, set_checkpointing, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixTree,
    enable_prefix_sharing,
    verify,
)
from hf_prefix_patch.documents import Trial, documents_reason
from hf_prefix_patch.hooks import patch_of
from hf_prefix_patch.plans import NOTHING_TO_GAIN, Plan
from hf_prefix_patch.verify import verify_sharing

TOGETHER = "several documents in a row, which this model was not seen to keep apart"
UNVERIFIED = "several documents in a row, of a model that was not verified"
CHANGED = "several documents in a row, and another attention than was verified"

APART = [family for family in FAMILIES if family != "gpt-oss"]
"""Unpatched gpt-oss makes its mask without positions, but in flash attention."""

composites = pytest.mark.needs(transformers=">=5")


def rows_of(*lists):
    return pad_rows([list(x) for x in lists], [1] * len(lists), "right")


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=7))
@settings(deadline=None, max_examples=200)
def test_trees_are_those_of_padded_rows(lists):
    """The same packed row and descriptors; a cell stands where its document does."""
    batch = rows_of(*lists)
    want = PrefixTree.from_rows(batch.input_ids, batch.attention_mask)
    inputs = documents(batch)
    tree = PrefixTree.from_rows(inputs["input_ids"], position_ids=inputs["position_ids"])
    for name in ("packed_index", "position_ids", "kv_index", "cu_seqlens_q", "cu_seqlens_k"):
        assert torch.equal(getattr(tree, name), getattr(want, name)), name
    assert (tree.parents, tree.segment_lengths) == (want.parents, want.segment_lengths)
    assert (tree.num_rows, tree.row_length) == (1, sum(map(len, lists)))
    assert tree.cell.tolist() == list(range(tree.row_length))
    packed = tree.pack(inputs["input_ids"])
    assert torch.equal(packed, want.pack(batch.input_ids))
    assert torch.equal(tree.unpack(packed), inputs["input_ids"])
    assert torch.equal(tree.pack(inputs["position_ids"]), tree.position_ids)


def test_documents_in_several_rows():
    """Any document may share with any other."""
    ids = torch.tensor([[5, 6, 7, 5, 6, 8], [5, 6, 7, 9, 5, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    tree = PrefixTree.from_rows(ids, position_ids=positions)
    assert tree.pack(ids).tolist() == [[5, 6, 7, 9, 8]]
    assert torch.equal(tree.unpack(tree.pack(ids)), ids)
    model = tiny_model()
    want = model(ids, position_ids=positions, use_cache=False).logits
    with enable_prefix_sharing(model) as sharing:
        got = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert (sharing.stats.packed_tokens, sharing.stats.padded_tokens) == (5, 12)


def test_a_mask_makes_each_row_one_document():
    """As transformers reads it: positions that come with a mask part nothing."""
    ids, positions = torch.tensor([[5, 6, 5, 6]]), torch.tensor([[0, 1, 0, 1]])
    assert PrefixTree.from_rows(ids, torch.ones_like(ids), positions).packed_tokens == 4
    assert PrefixTree.from_rows(ids, None, positions).packed_tokens == 2


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("family", APART)
def test_logps_and_gradients_equal_the_unpatched_model(family, mode):
    """Those of the documents in one row, which are those of padded rows as well."""
    model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa")
    set_checkpointing(model, mode)
    batch = preference_batch()
    want = run(model, batch, one_row=True, use_cache=False)
    if getattr(model.config, "num_experts_per_tok", None) is None:  # whose loss counts padding
        assert_same_run(run(model, batch), want)
    sharing = enable_prefix_sharing(model)
    seen = LayerTokens(model)
    assert_same_run(run(model, batch, one_row=True, use_cache=False), want)
    stats = sharing.stats
    assert (stats.calls, stats.bypassed.total()) == (1, 0)
    assert stats.packed_tokens < stats.row_tokens == stats.padded_tokens
    assert set(seen.shapes) == {(1, stats.packed_tokens)}


@pytest.mark.parametrize("family", ["gpt-oss", "lfm2", "mamba2"])
def test_models_that_see_documents_together_run_as_they_are(family):
    """Verification finds it out; the numbers are the unpatched model's, whatever they are worth."""
    if family in HYBRIDS:
        pytest.importorskip("tree_recurrence", reason="hybrids need tree-recurrence")
    model, batch = tiny_model(family), preference_batch()
    inputs = documents(batch)
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        alone = model(**batch.inputs, use_cache=False).logits
        assert (rows_of_documents(want, batch)[1, :9] - alone[1, :9]).abs().max() > 0.01
        with enable_prefix_sharing(model) as sharing:
            assert torch.equal(model(**inputs, use_cache=False).logits, want)
    # The stack of Mamba takes no positions, and its model hands none on.
    reason = NOTHING_TO_GAIN if family == "mamba2" else TOGETHER
    assert sharing.stats.bypassed == {reason: 1}


def test_documents_are_not_shared_unless_they_were_seen_apart():
    """Without verification, or in another attention than it saw."""
    model, batch = tiny_model(), preference_batch()
    inputs = documents(batch)
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        with enable_prefix_sharing(model, verify=False) as sharing:
            assert torch.equal(model(**inputs, use_cache=False).logits, want)
            assert sharing.stats.bypassed == {UNVERIFIED: 1}
            again = enable_prefix_sharing(model)
            model(**inputs, use_cache=False)
            assert again.stats.calls == 1
            enable_prefix_sharing(model, verify=False)
            model(**inputs, use_cache=False)
            assert again.stats.bypassed == {UNVERIFIED: 2}
            enable_prefix_sharing(model)
            model.config._attn_implementation = "eager"
            model(**inputs, use_cache=False)
            assert again.stats.calls == 1
            assert again.stats.bypassed == {UNVERIFIED: 2, CHANGED: 1}
            enable_prefix_sharing(model)
            model(**inputs, use_cache=False)
            assert again.stats.calls == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt-oss", "lfm2", "lfm2-moe", "qwen3-next", "nemotron-h"])
def test_a_little_is_seen_too(family, dtype):
    """With weights as small as transformers draws them, less than half precision rounds by."""
    if family in HYBRIDS:
        pytest.importorskip("tree_recurrence", reason="hybrids need tree-recurrence")
    model = tiny_model(family, initializer_range=0.02).to(dtype)
    with enable_prefix_sharing(model):
        assert not patch_of(model.model).trial.apart


def test_apart_but_not_the_same():
    """A model that computes something else of rows without a mask, whatever stands in them."""
    model, rows = tiny_model(), []

    def other(norm, args, output):
        if rows[-1] is None:
            return 2 * output

    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    model.model.norm.register_forward_hook(other)
    with enable_prefix_sharing(model):
        assert not patch_of(model.model).trial.apart


@pytest.mark.parametrize("family", APART)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_documents_apart(family, dtype):
    model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa").to(dtype)
    with enable_prefix_sharing(model):
        assert patch_of(model.model).trial == (model.config._attn_implementation, True)


def test_what_was_seen_is_looked_at_again(monkeypatch):
    """By calls that run as they are: shared ones would always find documents apart."""
    model = tiny_model()
    enable_prefix_sharing(model)
    patch, trials = patch_of(model.model), []
    seen = verify._behind_others
    monkeypatch.setattr(
        verify, "_behind_others", lambda *args: trials.append(patch.trial) or seen(*args)
    )
    verify_sharing(model, model.model)
    assert trials == [None]
    assert patch.trial == ("sdpa", True)


@pytest.mark.parametrize("options", [{"verify": False}, {"backend": "flash"}])
def test_an_inner_enable_gives_back_what_was_seen(options):
    """When it ends, or is refused."""
    model, batch = tiny_model(), preference_batch()
    outer = enable_prefix_sharing(model)
    with suppress(NotImplementedError), enable_prefix_sharing(model, **options):
        assert patch_of(model.model).trial is None
    model(**documents(batch), use_cache=False)
    assert outer.stats.calls == 1


def test_a_copy_knows_what_was_seen():
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model):
        reference = copy.deepcopy(model)
        reference(**documents(batch), use_cache=False)
    assert patch_of(reference.model).stats.calls == 1


def test_a_model_that_takes_no_positions():
    """It is verified and shared as ever, and its documents are not."""
    model, batch = tiny_model(), preference_batch()

    class Rows(type(model)):
        def forward(self, input_ids, attention_mask, use_cache=None):
            return super().forward(input_ids, attention_mask, use_cache=use_cache)

    model.__class__ = Rows
    want = run(model, batch)
    with enable_prefix_sharing(model) as sharing:
        assert_same_run(run(model, batch), want)
        assert not patch_of(model.model).trial.apart
    assert sharing.stats.calls == 1


def test_a_cache_that_nobody_asked_for():
    """In training transformers makes one where the config has it, and reads the row as one."""
    model, batch = tiny_model(), preference_batch()
    assert model.config.use_cache
    with enable_prefix_sharing(model) as sharing, pytest.warns(UserWarning, match="and a cache"):
        got = run(model, batch, one_row=True)
    assert_same_run(got, run(model, batch, one_row=True), tolerance=0.0)
    assert sharing.stats.bypassed == {"several documents in a row, and a cache": 1}
    model.config.use_cache = False
    with enable_prefix_sharing(model) as sharing:
        run(model, batch, one_row=True)
    assert sharing.stats.calls == 1


@pytest.mark.parametrize(
    "positions", [[0, 1, 2, 5, 6, 7], [3, 4, 5, 0, 1, 2], [0, 1, 2, 2, 3, 4], [2, 1, 0, 2, 1, 0]]
)
def test_positions_that_do_not_begin_at_0(positions):
    """What they mean depends on the attention."""
    model = tiny_model()
    ids, positions = torch.tensor([[5, 6, 7, 5, 6, 8]]), torch.tensor([positions])
    with torch.no_grad():
        want = model(ids, position_ids=positions, use_cache=False).logits
        with enable_prefix_sharing(model) as sharing:
            got = model(ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(got, want)
    assert sharing.stats.bypassed == {"position_ids that jump": 1}


def test_padding_at_the_end_of_the_row():
    """As some trainers fill it up: a document of one token each."""
    model, batch = tiny_model(), preference_batch()
    inputs = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in documents(batch).items()}
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        with enable_prefix_sharing(model) as sharing:
            got = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert sharing.stats.packed_tokens == tree_of_rows([*batch.rows, [0]]).packed_tokens


def test_flash_attention_parts_documents_of_one_row_only():
    model = tiny_model(use_cache=False)

    def reason(attention, rows, positions=(0, 1, 0, 1)):
        model.config._attn_implementation_internal = attention
        inputs = {"input_ids": torch.zeros(rows, 4), "position_ids": torch.tensor([positions])}
        return documents_reason(model.model, inputs, Trial(attention, apart=True), media=False)

    assert reason("flash_attention_2", 1) is None
    told = "several documents in each of several rows, in flash attention"
    assert reason("flash_attention_2", 2) == told
    assert reason("flash_attention_2", 2, positions=range(4)) is None
    assert reason("sdpa", 2) is None


@composites
@pytest.mark.parametrize("family", ["llava", "qwen3-vl-moe", "smolvlm", "mistral3"])
def test_composites_share_documents_of_text(family):
    model, batch = tiny_composite(family), preference_batch(vocab=40)
    want = run(model, batch, one_row=True, use_cache=False)
    with enable_prefix_sharing(model) as sharing:
        assert_same_run(run(model, batch, one_row=True, use_cache=False), want, of_model=True)
    assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (1, 0)


@composites
@pytest.mark.parametrize("asks", ["composite", "text"])
def test_a_cache_that_one_config_of_a_composite_asks_for(asks):
    """Either may make one."""
    model, batch = tiny_composite("smolvlm"), preference_batch(vocab=40)
    model.config.use_cache = asks == "composite"
    model.config.text_config.use_cache = asks == "text"
    want = run(model, batch, one_row=True)
    with enable_prefix_sharing(model, on_bypass="ignore") as sharing:
        assert_same_run(run(model, batch, one_row=True), want, tolerance=0.0)
    assert sharing.stats.bypassed == {"several documents in a row, and a cache": 1}


def test_plans_made_by_a_wrapped_collator():
    """In the data loader's worker, where positions are there to plan by."""
    batch = preference_batch()
    planned = DataCollatorWithPrefixSharing.wrap(lambda _: documents(batch))([])
    tree = planned["input_ids"].prefix_tree
    assert tree.packed_tokens < tree.row_tokens
    model = tiny_model()
    want = run(model, batch, one_row=True, use_cache=False)
    with enable_prefix_sharing(model) as sharing:
        model(**planned, use_cache=False)
        assert sharing.stats.packed_tokens == tree.packed_tokens
        assert_same_run(run(model, batch, one_row=True, use_cache=False), want)


def test_many_documents_of_one_token():
    """As many as there are tokens: nothing is laid out documents by longest."""
    length = 20_000
    positions = np.zeros((1, length), np.int64)
    positions[0, : length // 2] = np.arange(length // 2)
    plan = Plan.of_rows(torch.zeros(1, length, dtype=torch.long), None, positions)
    assert plan.tree.packed_tokens == length // 2


def test_flattening_collator_of_transformers(tmp_path):
    """A stock `Trainer` with padding-free batches: the same losses."""
    examples = [{"input_ids": row, "labels": row} for row in preference_batch().rows]

    def train(sharing):
        args = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=4,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        model = tiny_model()
        model.config.use_cache = False  # as Trainer does from transformers 5 on
        trainer = Trainer(model, args, DataCollatorWithFlattening(), examples)
        handle = enable_prefix_sharing(trainer) if sharing else None
        trainer.train()
        return [x["loss"] for x in trainer.state.log_history if "loss" in x], handle

    want, _ = train(False)
    got, handle = train(True)
    assert got == pytest.approx(want, abs=2e-4)
    assert (handle.stats.calls, handle.stats.bypassed.total()) == (3, 0)
    assert handle.stats.sharing_ratio > 1.4


@composites
def test_documents_with_images_run_as_they_are():
    batch, images = image_batch("llava")
    model = tiny_composite("llava")
    inputs = documents(batch)
    with torch.no_grad():
        want = model(**inputs, **images, use_cache=False).logits
        with enable_prefix_sharing(model) as sharing:
            got = model(**inputs, **images, use_cache=False).logits
    assert torch.equal(got, want)
    assert sharing.stats.bypassed == {"several documents in a row, with images or sound": 1}


@pytest.mark.parametrize("one_document", [False, True])
def test_boundaries_that_are_given_along(one_document):
    """Those of the rows, which the packed row's layers do not see."""
    model, batch = tiny_model(), preference_batch()
    if one_document:
        batch = rows_of(batch.input_ids[0].tolist())
    want = run(model, batch, one_row=True, use_cache=False)
    seen = []
    first = model.model.layers[0]
    first.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with enable_prefix_sharing(model) as sharing:
        seen.clear()
        got = run(model, batch, one_row=True, use_cache=False, **boundaries(batch))
    assert_same_run(got, want)
    if one_document:
        assert sharing.stats.bypassed == {NOTHING_TO_GAIN: 1}
    else:
        assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (1, 0)
        assert not seen[0].keys() & boundaries(batch).keys()


def test_boundaries_under_another_default_device():
    """Programs set it to where models are to be made; rows and boundaries are where they are."""
    model, batch = tiny_model(), preference_batch()
    inputs = documents(batch) | boundaries(batch)
    with torch.no_grad(), enable_prefix_sharing(model) as sharing, torch.device("meta"):
        model(**inputs, use_cache=False)
    assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (1, 0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cu_seq_lens_q", lambda ends: ends[[0, 1, 2, 4]]),
        ("cu_seq_lens_k", lambda ends: ends[[0, 1, 2, 4]]),
        ("seq_idx", lambda numbers: numbers // 2),
        ("seq_idx", lambda numbers: numbers[0]),
        ("seq_idx", lambda numbers: numbers.tolist()),
        ("cu_seq_lens_q", lambda ends: ends.numpy()),
        ("cu_seq_lens_k", lambda ends: 4),
    ],
)
def test_boundaries_of_other_documents(name, change):
    model, batch = tiny_model(), preference_batch()
    given = boundaries(batch)
    given[name] = change(given[name])
    with torch.no_grad():
        want = model(**documents(batch), use_cache=False, **given).logits
        with enable_prefix_sharing(model) as sharing:
            assert torch.equal(model(**documents(batch), use_cache=False, **given).logits, want)
    reason = "boundaries of documents that are not those of position_ids"
    assert sharing.stats.bypassed == {reason: 1}


def test_boundaries_without_positions():
    """Nothing says what the tokens' positions are."""
    model, batch = tiny_model(), preference_batch()
    with enable_prefix_sharing(model) as sharing, torch.no_grad():
        model(documents(batch)["input_ids"], use_cache=False, **boundaries(batch))
        model(**batch.inputs, use_cache=False, **boundaries(batch))
    assert sharing.stats.bypassed == {"input 'cu_seq_lens_q'": 2}
