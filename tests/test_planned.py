"""Plans that ride on the rows of a batch: where they arrive, and where they must not be used."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    concatenate,
    get_data_structure,
    initialize_tensors,
    send_to_device,
    slice_tensors,
)
from batches import LayerTokens, assert_same_run, preference_batch, run
from families import tiny_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixTree,
    enable_prefix_sharing,
    plans,
)
from hf_prefix_patch.planned import PlannedTensor, attach_plan, plan_of
from hf_prefix_patch.plans import Plan

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [11]},
    {"prompt_ids": [5, 6, 12], "chosen_ids": [13], "rejected_ids": [14, 15, 16]},
    {"prompt_ids": [5, 17], "chosen_ids": [18, 19], "rejected_ids": [20, 21]},
    {"prompt_ids": [22, 23], "chosen_ids": [24], "rejected_ids": [25, 26]},
]
collate = DataCollatorWithPrefixSharing(pad_token_id=0, pad_to_multiple_of=8)


@pytest.fixture
def batch():
    return collate(PAIRS[:2])


@pytest.fixture
def no_planning(monkeypatch):
    """Whoever compares tokens in the model fails."""

    def fail(*rows):
        raise AssertionError("rows were planned where they had a plan")

    monkeypatch.setattr(plans.Plan, "of_host_rows", fail)


def inputs_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


MOVES = {
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
    "same device": lambda batch: {name: x.to("cpu") for name, x in batch.items()},
    "another device": lambda batch: {name: x.to("meta") for name, x in batch.items()},
    "accelerate": lambda batch: send_to_device(batch, torch.device("meta"), non_blocking=True),
    "trainer": lambda batch: Trainer._prepare_input(_TrainerStandIn(), batch),
    "detach": lambda batch: {name: x.detach() for name, x in batch.items()},
    "contiguous": lambda batch: {name: x.contiguous() for name, x in batch.items()},
    "twice": lambda batch: pickle.loads(
        pickle.dumps({name: x.to("cpu", copy=True) for name, x in batch.items()})
    ),
}


class _TrainerStandIn:
    is_deepspeed_enabled = False
    args = type("Args", (), {"device": torch.device("meta")})

    def _prepare_input(self, data):
        return Trainer._prepare_input(self, data)


@pytest.mark.parametrize("move", MOVES)
def test_moves_keep_the_plan(batch, move):
    want = batch["input_ids"].prefix_tree
    plan = plan_of(inputs_of(MOVES[move](batch)))
    assert plan is not None
    assert torch.equal(plan.tree.source, want.source)
    assert plan.tree.parents == want.parents
    assert plan.tree.source.device.type == "cpu"


@pytest.mark.parametrize("workers", [0, 2])
def test_workers(no_planning, workers):
    """The plan is made in the worker; the model uses it and makes none."""
    del no_planning
    loader = DataLoader(PAIRS, batch_size=2, num_workers=workers, collate_fn=_collate_anyhow)
    model = tiny_model()
    with enable_prefix_sharing(model, verify=False) as sharing:
        for batch in loader:
            model(**inputs_of(batch), use_cache=False)
    assert sharing.stats.calls == 2
    assert not sharing.stats.bypassed


_plan_of_rows = Plan.of_host_rows


def _collate_anyhow(examples):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans.Plan, "of_host_rows", _plan_of_rows)
        return collate(examples)


@pytest.mark.needs(transformers=">=5")  # before, rotary embeddings do not run on meta
def test_a_planned_call_never_waits_for_its_device(batch):
    """On the meta device whoever reads a value fails; so would a GPU be waited for there."""
    model = tiny_model().to("meta")
    with enable_prefix_sharing(model, verify=False) as sharing:
        seen = LayerTokens(model)
        loss = model(**send_to_device(inputs_of(batch), torch.device("meta"))).logits.sum()
        loss.backward()
    assert seen.shapes == [(1, batch["input_ids"].prefix_tree.packed_tokens)]
    assert sharing.stats.calls == 1
    plain = {name: torch.empty_like(x, device="meta") for name, x in inputs_of(batch).items()}
    with (
        enable_prefix_sharing(model, verify=False),
        pytest.raises(ValueError, match="rows are on the meta device"),
    ):
        model(**plain)


def test_planned_and_plain_rows_give_the_same(batch):
    model = tiny_model()
    rows = preference_batch()
    want = run(model, rows)
    tensors = attach_plan(Plan.of_rows(*rows.inputs.values()), rows.inputs)
    planned = copy.copy(rows)
    planned.input_ids, planned.attention_mask = tensors.values()
    with enable_prefix_sharing(model) as sharing:
        plans.forget()
        got = run(model, planned)
        assert plans._last is None  # nothing was planned and remembered
        again = run(model, rows)
    assert_same_run(got, want)
    assert all(torch.equal(got[1][name], x) for name, x in again[1].items())
    assert sharing.stats.calls == 2


COMPUTED = {
    "arithmetic": lambda x: x + 0,
    "slice": lambda x: x[:2],
    "clone": lambda x: x.clone(),
    "other dtype": lambda x: x.to(torch.int32),
    "masked": lambda x: x.masked_fill(x == 9, 3),
    "joined": lambda x: torch.cat([x, x]),
    "equal mask": torch.ones_like,
    "view": lambda x: x.view(-1),
    "deep copy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COMPUTED)
def test_what_is_computed_is_a_plain_tensor(batch, how):
    assert type(COMPUTED[how](batch["input_ids"])) is torch.Tensor


def _write_to_a_view(x):
    x[:, 1:][0, 0] = 3


def _write_uncounted(x):
    """As collectives do."""
    with torch.autograd._unsafe_preserve_version_counter(x):
        x[0].fill_(0)


WRITES = {
    "item": lambda x: x.__setitem__((0, 1), 3),
    "operator": lambda x: x.clamp_(max=8),
    "view": _write_to_a_view,
    "data": lambda x: x.data[0].fill_(0),
    "numpy": lambda x: x.numpy()[0].fill(0),
    "array": lambda x: np.asarray(x)[0].fill(0),
    "data of a view": lambda x: x.view(-1).data[:3].fill_(0),
    "numpy of a view": lambda x: x[0].numpy().fill(0),
    "numpy of a detached one": lambda x: x.detach().numpy()[0].fill(0),
    "set data": lambda x: setattr(
        x, "data", torch.full_like(x, 7).triu().as_subclass(torch.Tensor)
    ),
    "without counting": _write_uncounted,
    "dlpack": lambda x: torch.from_dlpack(x.as_subclass(torch.Tensor))[0].fill_(0),
    "out": lambda x: torch.add(x, 1, out=x),
}


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
@pytest.mark.parametrize("how", WRITES)
def test_written_rows_lose_their_plan(batch, how, name):
    assert plan_of(inputs_of(batch)) is not None
    WRITES[how](batch[name])
    assert plan_of(inputs_of(batch)) is None


@pytest.mark.parametrize("copied", [copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_written_rows_have_no_plan_either(batch, copied):
    batch["input_ids"][0, 0] = 3
    copies = inputs_of({name: copied(x) for name, x in batch.items()})
    assert copies["input_ids"].prefix_tree is None
    assert plan_of(copies) is None


def test_a_write_that_changes_nothing_shared_keeps_the_plan(batch):
    """What matters is that shared tokens are still those that they are shared with."""
    tree = batch["input_ids"].prefix_tree
    batch["input_ids"].numpy()[batch["input_ids"].numpy() == 10] = 30  # a token of one row alone
    plan = plan_of(inputs_of(batch))
    assert plan.tree is tree
    model = tiny_model()
    want = model(**{name: x.clone() for name, x in inputs_of(batch).items()}).logits
    with enable_prefix_sharing(model):
        got = model(**inputs_of(batch)).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real])


def test_written_rows_are_planned_anew(batch):
    model = tiny_model()
    batch["input_ids"][1] = batch["input_ids"][0]
    plain = {name: torch.tensor(x.tolist()) for name, x in inputs_of(batch).items()}
    want = model(**plain, use_cache=False).logits
    with enable_prefix_sharing(model) as sharing:
        got = model(**inputs_of(batch), use_cache=False).logits
    real = plain["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real])
    assert sharing.stats.calls == 1


def test_a_plan_is_for_its_rows_alone(batch):
    other = collate(PAIRS[2:])
    inputs = inputs_of(batch)
    assert plan_of(inputs) is not None
    assert plan_of(inputs | {"attention_mask": None}) is None
    assert plan_of(inputs | {"attention_mask": other["attention_mask"]}) is None
    assert plan_of(inputs | {"attention_mask": inputs["attention_mask"].clone()}) is None
    assert plan_of(inputs | {"attention_mask": inputs["input_ids"]}) is None
    assert plan_of(inputs | {"position_ids": torch.arange(8)[None]}) is None
    assert plan_of({"input_ids": inputs["attention_mask"], "attention_mask": None}) is None


def test_a_reference_in_inference_mode_leaves_a_plan_for_training(batch):
    """What it moved to the device is no inference tensor, which could not be saved for backward."""
    model = tiny_model()
    moved = PrefixTree.to

    def copying(tree, device):
        return moved(copy.deepcopy(tree), device)

    with enable_prefix_sharing(model, verify=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixTree, "to", copying)
        with torch.inference_mode():
            model(**inputs_of(batch), use_cache=False)
        model(**inputs_of(batch), use_cache=False).logits.sum().backward()


def test_inference_tensors_have_no_plan(batch):
    """torch does not count what is written to them."""
    with torch.inference_mode():
        copied = {name: x.to("cpu", copy=True) for name, x in inputs_of(batch).items()}
    assert plan_of(copied) is None


def test_rows_behave_as_tensors(batch):
    """An unpatched model, the usual questions, printing."""
    ids = batch["input_ids"]
    plain = torch.tensor(ids.tolist())
    assert isinstance(ids, PlannedTensor)
    assert torch.equal(ids, plain)
    assert ids.shape == plain.shape
    assert str(plain.tolist()[0][:3])[1:-1].replace(" ", "") in repr(ids).replace(" ", "")
    model = tiny_model()
    got = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    want = model(input_ids=plain, attention_mask=torch.tensor(batch["attention_mask"].tolist()))
    assert torch.equal(got, want.logits)
    embedding = nn.Embedding(50, 4)
    assert type(embedding(ids)) is torch.Tensor


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(PAIRS)


def test_dispatched_batches_in_one_process():
    """accelerate then slices every tensor of a batch along its rows."""
    config = DataLoaderConfiguration(dispatch_batches=True)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    loader = accelerator.prepare(DataLoader(_Stream(), batch_size=2, collate_fn=collate))
    model = tiny_model()
    wants = [collate(PAIRS[:2]), collate(PAIRS[2:])]
    with enable_prefix_sharing(model) as sharing:
        for got, want in zip(loader, wants, strict=True):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
            model(**inputs_of(got), use_cache=False)
    assert sharing.stats.calls == 2
    assert sharing.stats.packed_tokens == sum(
        x["input_ids"].prefix_tree.packed_tokens for x in wants
    )


def test_dispatched_batches_for_two_processes():
    """What accelerate does with the batches of two processes: join, send, cut."""
    wants = [collate(PAIRS[:2]), collate(PAIRS[2:])]
    joined = concatenate(wants, dim=0)
    received = initialize_tensors(get_data_structure(joined))
    for name, x in received.items():
        x.copy_(joined[name])
    for process, want in enumerate(wants):
        for whole in (joined, received):
            got = slice_tensors(whole, slice(4 * process, 4 * process + 4))
            assert all(torch.equal(got[name], want[name]) for name in want)
            assert plan_of(inputs_of(got)) is None
