"""The collator: TRL's tensors, the model's own plan, either layout."""

import copy
import dataclasses
import inspect
import pickle
import pkgutil

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from batches import assert_same_tree
from hypothesis import given
from torch.utils.data import DataLoader
from transformers import BatchEncoding, DataCollatorForLanguageModeling
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_prefix_patch import DataCollatorWithPrefixSharing, PrefixTree
from hf_prefix_patch.planned import PackedRow, PlannedTensor, plan_of

# Some pairs here have an empty answer, or one that is cut away, as some of TRL's do.
pytestmark = pytest.mark.filterwarnings("ignore:a row has no completion token:UserWarning")

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [9, 11, 12]},
    {"prompt_ids": [5, 6, 12], "chosen_ids": [13], "rejected_ids": [14, 15, 16, 17]},
    {"prompt_ids": [], "chosen_ids": [18, 19], "rejected_ids": [18, 20]},
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": []},
]
OPTIONS = {
    "plain": {},
    "keep-start": {"max_length": 5},
    "keep-end": {"max_length": 5, "truncation_mode": "keep_end"},
    "prompt-cut-away": {"max_length": 2, "truncation_mode": "keep_end"},
    "completion-cut-away": {"max_length": 3},
    "multiple": {"pad_to_multiple_of": 16},
    "multiple-of-cut": {"max_length": 6, "pad_to_multiple_of": 4},
}
makes_rows = pytest.mark.needs(trl=">=0.29")  # before, TRL collates prompts and completions apart
ids = st.lists(st.integers(1, 3), max_size=5)
pairs = st.lists(
    st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}),
    min_size=1,
    max_size=5,
).filter(lambda batch: any(any(pair.values()) for pair in batch))
# TRL gives a batch whose first row is empty in floating point.
first_row_filled = pairs.filter(lambda batch: batch[0]["prompt_ids"] + batch[0]["chosen_ids"])


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name
        assert got[name].dtype == x.dtype, name


@makes_rows
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_tensors_are_those_of_trl(options, old_names, reference):
    examples = [dict(pair) for pair in PAIRS]
    if reference:
        for i, pair in enumerate(examples):
            pair |= {"ref_chosen_logps": -1.5 * i, "ref_rejected_logps": -2.0 - i}
    want = DataCollatorForPreference(pad_token_id=2, **options)(examples)
    if old_names:
        examples = [
            {name.replace("_ids", "_input_ids"): x for name, x in pair.items()} for pair in examples
        ]
    assert_same_tensors(DataCollatorWithPrefixSharing(pad_token_id=2, **options)(examples), want)


def test_older_names_of_answers_with_and_without_their_prompt():
    """With it where both begin with it: an answer may repeat the question."""
    collator = DataCollatorWithPrefixSharing(pad_token_id=0)
    pair = {"prompt_input_ids": [5], "chosen_input_ids": [5, 6, 7], "rejected_input_ids": [8, 9]}
    batch = collator([pair])
    assert batch["input_ids"].tolist() == [[5, 5, 6, 7], [5, 8, 9, 0]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1, 1], [0, 1, 1, 0]]
    batch = collator([pair | {"rejected_input_ids": [5, 8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 8, 0]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1], [0, 1, 0]]


@makes_rows
@given(
    first_row_filled, st.sampled_from([{}, {"max_length": 3}]), st.sampled_from(["start", "end"])
)
def test_any_batch(batch, options, end):
    options = options | {"truncation_mode": f"keep_{end}"}
    got = DataCollatorWithPrefixSharing(pad_token_id=1, **options)(batch)
    want = DataCollatorForPreference(pad_token_id=1, **options)(batch)
    assert_same_tensors(got, want)
    tree = PrefixTree.from_rows(want["input_ids"], want["attention_mask"])
    assert_same_tree(got["input_ids"].prefix_tree, tree)


def test_the_plan_is_that_of_the_model():
    batch = DataCollatorWithPrefixSharing(pad_token_id=0)(PAIRS)
    plan = plan_of({name: batch[name] for name in ("input_ids", "attention_mask")})
    plain = [torch.tensor(batch[name].tolist()) for name in ("input_ids", "attention_mask")]
    want = PrefixTree.from_rows(*plain)
    assert_same_tree(plan.tree, want)
    got_kwargs, want_kwargs = plan.tree.model_kwargs(), want.model_kwargs()
    for name, x in want_kwargs.items():
        assert (
            torch.equal(x, got_kwargs[name])
            if isinstance(x, torch.Tensor)
            else (x == got_kwargs[name])
        )


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_ids_of_formatted_data_sets(kind):
    make = np.array if kind == "numpy" else torch.tensor
    examples = [
        {
            name: make(x, dtype=int) if kind == "numpy" else make(x, dtype=torch.int64)
            for name, x in pair.items()
        }
        for pair in PAIRS
    ]
    collator = DataCollatorWithPrefixSharing(pad_token_id=0)
    assert_same_tensors(collator(examples), collator(PAIRS))


@given(pairs)
def test_packed_batches_find_every_completion_token(batch):
    """Logits and labels of the packed row are those at the completion tokens of the rows."""
    rows = DataCollatorWithPrefixSharing(pad_token_id=0)(batch)
    packed = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")(batch)
    tree = rows["input_ids"].prefix_tree
    assert torch.equal(packed["input_ids"], tree.pack(rows["input_ids"]))
    for name, x in tree.model_kwargs().items():
        assert torch.equal(packed[name], x) if isinstance(x, torch.Tensor) else packed[name] == x
    mask = rows["completion_mask"][:, 1:].bool()
    assert packed["completion_lengths"].tolist() == mask.sum(1).tolist()
    index = packed["completion_index"]
    labels = packed["logit_labels"][index]
    assert labels.tolist() == rows["input_ids"][:, 1:][mask].tolist()
    places = tree.unpack(torch.arange(tree.packed_tokens)[None])[:, :-1][mask]
    assert packed["logit_index"][index].tolist() == places.tolist()
    distinct = set(zip(places.tolist(), labels.tolist(), strict=True))
    assert len(packed["logit_index"]) == len(distinct)


def test_reference_logps_in_a_packed_batch():
    examples = [pair | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in PAIRS]
    batch = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")(examples)
    assert batch["ref_chosen_logps"].tolist() == [-1.0] * 4
    assert batch["ref_rejected_logps"].dtype == torch.float32


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_batches_are_made_on_the_host(layout):
    """Whatever the default device of the program."""
    examples = [pair | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in PAIRS]
    with torch.device("meta"):
        batch = DataCollatorWithPrefixSharing(pad_token_id=0, layout=layout)(examples)
    tensors = [x for x in batch.values() if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors} == {"cpu"}


def test_a_packed_batch_needs_no_padding():
    want = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")(PAIRS)
    got = DataCollatorWithPrefixSharing(pad_token_id=None, layout="packed")(PAIRS)
    assert torch.equal(got["input_ids"], want["input_ids"])


@pytest.mark.parametrize("workers", [0, 1])
def test_packed_batches_through_a_loader_and_to_a_device(workers):
    collator = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")
    loader = DataLoader(PAIRS, batch_size=2, num_workers=workers, collate_fn=collator)
    for batch, examples in zip(loader, (PAIRS[:2], PAIRS[2:]), strict=True):
        want = collator(examples)
        moved = batch.to("cpu", non_blocking=True)
        assert moved.keys() == want.keys()
        assert isinstance(moved["input_ids"], PackedRow)
        assert_same_tree(moved["input_ids"].prefix_tree, want["input_ids"].prefix_tree)
        assert batch.to("meta")["tree_kv_index"].device.type == "meta"


class _Tokenizer:
    """What transformers' collators ask of one."""

    pad_token_id, mask_token, pad_token = 0, None, "<pad>"

    def pad(self, features, **options):
        length = max(len(x["input_ids"]) for x in features)
        rows = [x["input_ids"] + [0] * (length - len(x["input_ids"])) for x in features]
        mask = [[1] * len(x["input_ids"]) + [0] * (length - len(x["input_ids"])) for x in features]
        return BatchEncoding(
            {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
        )


ROWS = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [5, 6, 9]}]
COMPLETIONS = [
    {"prompt_ids": [5, 6], "completion_ids": [7], "KL_completion_ids": [8, 9], "label": True},
    {"prompt_ids": [5, 6], "completion_ids": [9], "KL_completion_ids": [7], "label": False},
]
WHOLE = [
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9], "margin": 0.5},
    {"chosen_ids": [5, 7], "rejected_ids": [5, 6], "margin": 0.0},
]
COLLATORS = {
    "preference": ("trl.trainer.dpo_trainer:DataCollatorForPreference", PAIRS, [""]),
    "reward": ("trl.trainer.reward_trainer:DataCollatorForPreference", WHOLE, [""]),
    "kto": ("trl.trainer.kto_trainer:DataCollatorForUnpairedPreference", COMPLETIONS, ["", "KL_"]),
    "padding": ("transformers:DataCollatorWithPadding", ROWS, [""]),
    "language-model": ("transformers:DataCollatorForLanguageModeling", ROWS, [""]),
}


@pytest.mark.parametrize(
    ("name", "examples", "kinds"),
    [
        pytest.param(*values, id=name, marks=makes_rows if values[0].startswith("trl") else ())
        for name, values in COLLATORS.items()
    ],
)
def test_wrapped_collators(name, examples, kinds):
    options = {"mlm": False} if name.endswith("LanguageModeling") else {}
    arguments = {"pad_token_id": 0} if name.startswith("trl") else {"tokenizer": _Tokenizer()}
    collator = pkgutil.resolve_name(name)(**arguments, **options)
    want = collator([dict(x) for x in examples])
    wrapped = DataCollatorWithPrefixSharing.wrap(collator)
    got = pickle.loads(pickle.dumps(wrapped))([dict(x) for x in examples])
    assert type(got) is type(want)
    assert_same_tensors(got, want)
    for kind in kinds:
        rows = {name: got[kind + name] for name in ("input_ids", "attention_mask")}
        want_tree = PrefixTree.from_rows(*(want[kind + name] for name in rows))
        assert_same_tree(plan_of(rows).tree, want_tree)
        assert want_tree.packed_tokens < want_tree.row_tokens


@pytest.mark.needs(trl="<0.29")
def test_parts_of_rows_are_joined_without_a_trace():
    """Plans of prompts and completions do not outlive TRL's joining them to rows."""
    collator = DataCollatorForPreference(pad_token_id=0)
    examples = [{name.replace("_", "_input_"): x for name, x in pair.items()} for pair in PAIRS[:3]]
    got = DataCollatorWithPrefixSharing.wrap(collator)(examples)
    assert_same_tensors(got, collator(examples))
    joined = DPOTrainer.concatenated_inputs(got, padding_value=0)
    assert {type(x) for x in joined.values()} == {torch.Tensor}


def test_a_wrapped_collator_is_still_itself():
    inner = DataCollatorForLanguageModeling(_Tokenizer(), mlm=False, pad_to_multiple_of=7)
    wrapped = DataCollatorWithPrefixSharing.wrap(inner)
    assert wrapped.pad_to_multiple_of == 7
    assert wrapped.collator is inner
    assert DataCollatorWithPrefixSharing.wrap(wrapped) is wrapped
    ours = DataCollatorWithPrefixSharing(pad_token_id=0)
    assert DataCollatorWithPrefixSharing.wrap(ours) is ours
    with pytest.raises(AttributeError):
        _ = wrapped.no_such_option


def test_wrapping_leaves_what_has_no_rows():
    for batch in ([1, 2], {"x": torch.zeros(2, 2)}, {"input_ids": [[1]]}, {"input_ids": "text"}):
        assert DataCollatorWithPrefixSharing.wrap(lambda _, given=batch: given)([]) is batch
    images = {"input_ids": torch.ones(2, 3, 4, dtype=torch.int64)}
    got = DataCollatorWithPrefixSharing.wrap(lambda _: images)([])
    assert not isinstance(got["input_ids"], PlannedTensor)


@dataclasses.dataclass
class Padding:
    """A collator with an option."""

    length: int = 4

    def __call__(self, examples):
        return {"input_ids": torch.tensor([x + [0] * (self.length - len(x)) for x in examples])}


def test_a_wrapped_collator_is_that_collator_to_others():
    """Trainers ask for its class, set its options, copy it and send it to workers."""
    wrapped = DataCollatorWithPrefixSharing.wrap(Padding())
    assert isinstance(wrapped, Padding)
    wrapped.length = 6
    assert wrapped.length == wrapped.collator.length == 6
    for other in (wrapped, copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert type(other) is type(wrapped)
        ids = other([[5, 6, 7], [5, 6, 8]])["input_ids"]
        assert ids.shape == (2, 6)
        assert ids.prefix_tree.packed_tokens == 4 + 6


def test_a_wrapped_function_is_no_function_to_others():
    """`inspect` would look for its code."""
    wrapped = DataCollatorWithPrefixSharing.wrap(Padding().__call__)
    assert not inspect.isroutine(wrapped)
    assert len(inspect.signature(wrapped).parameters) == 2
