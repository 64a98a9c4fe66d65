"""PrefixIndex against PrefixTree, and the groups that it finds."""

import numpy as np
import pytest
from batches import tree_of_rows
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prefix_patch.prefix_index import PrefixIndex, read_index

ROW = st.lists(st.integers(0, 2), max_size=7)
EXAMPLES = st.lists(st.lists(ROW, min_size=1, max_size=3), min_size=1, max_size=6)


def index_of(examples):
    return PrefixIndex([np.array(ids, np.int64) for ids in rows] for rows in examples)


def packed_tokens(rows):
    """Of the right-padded rows, by `PrefixTree`; it takes no batch without a token."""
    return tree_of_rows(rows).packed_tokens if any(map(len, rows)) else 0


@given(EXAMPLES, st.data())
@settings(deadline=None, max_examples=300)
def test_unique_tokens_are_those_of_the_tree(examples, data):
    """Any examples of the index: shared, identical, nested and empty rows."""
    index = index_of(examples)
    chosen = data.draw(st.sets(st.sampled_from(range(len(examples)))))
    places = sorted(place for example in chosen for place in index.places[example])
    rows = [row for example in chosen for row in examples[example]]
    assert index.unique_tokens(places) == packed_tokens(rows)


@given(EXAMPLES, st.data())
@settings(deadline=None, max_examples=300)
def test_shared_tokens_are_what_joining_saves(examples, data):
    """Two sets of rows in any interleaving, either of them empty too."""
    index = index_of(examples)
    count = sum(map(len, examples))
    sides = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    first, second = ([place for place, s in enumerate(sides) if s == side] for side in (0, 1))
    apart = index.unique_tokens(first) + index.unique_tokens(second)
    together = index.unique_tokens(sorted(first + second))
    assert index.shared_tokens(first, second) == apart - together


@given(EXAMPLES, st.data())
@settings(deadline=None, max_examples=200)
def test_groups_hold_every_example_once(examples, data):
    index = index_of(examples)
    chosen = data.draw(st.sets(st.sampled_from(range(len(examples))), min_size=1))
    prompts = data.draw(st.lists(st.integers(0, 1), min_size=6, max_size=6))

    def members(group):
        return [x for m in group for x in ([m] if isinstance(m, int) else members(m))]

    assert sorted(members(index.groups(sorted(chosen), prompts))) == sorted(chosen)


def test_groups_nest_where_the_prefix_grows_by_a_notable_part():
    """A document of 60 tokens, two questions of 20 on it, another document, loners."""
    document, other = list(range(60)), list(range(150, 210))
    questions = [document + [n] * 20 for n in (70, 71)]
    starts = [questions[0], questions[1], other, [251], questions[0], other, questions[1], [250]]
    index = index_of([[[*start, 100 + i]] for i, start in enumerate(starts)])
    assert index.groups(range(8), range(8)) == [[[0, 4], [1, 6]], [2, 5], 7, 3]


def test_examples_that_only_begin_with_the_same_word_are_no_group():
    """One token of eleven is below a tenth, two are not."""
    word = index_of([[[1] * 1 + [10 + i] * 10] for i in range(3)] + [[[2] * 11]])
    assert word.groups(range(4), range(4)) == [0, 1, 2, 3]
    words = index_of([[[1] * 2 + [10 + i] * 9] for i in range(3)] + [[[2] * 11]])
    assert words.groups(range(4), range(4)) == [[0, 1, 2], 3]


def test_what_all_examples_begin_with_makes_no_group():
    """A long system prompt before everything, and two tokens of the rest in common."""
    index = index_of(
        [[[1] * 50 + [start] * 2 + [10 + i] * 30] for i, start in enumerate([2, 2, 3])]
    )
    assert index.groups(range(3), range(3)) == [0, 1, 2]


def test_a_prompt_is_a_group_however_short():
    """A prompt of one token and answers of 40; answers that begin alike are no group within it."""
    index = index_of([[[1] + [start] * 2 + [10 + i] * 40] for i, start in enumerate([5, 5, 6])])
    loner = index_of([[[1] + [s] * 2 + [10 + i] * 40] for i, s in enumerate([5, 5, 6])] + [[[2]]])
    assert index.groups(range(3), [0, 0, 0]) == [0, 1, 2]
    assert loner.groups(range(4), [0, 0, 0, 1]) == [[0, 1, 2], 3]
    assert loner.groups(range(4), [0, 1, 2, 3]) == [0, 1, 2, 3]


PAIR = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6]}


@pytest.mark.parametrize("as_data", [list, Dataset.from_list])
def test_prompts_are_compared_before_they_are_cut(as_data):
    pairs = [PAIR, PAIR | {"chosen_ids": [7]}, PAIR | {"prompt_ids": [1, 2, 9]}]
    index, prompts = read_index(as_data(pairs), 2, "keep_start", progress=False)
    assert index.unique_tokens(range(6)) == 2
    assert prompts == [0, 0, 1]


def test_examples_without_a_prompt_have_none_in_common():
    data = [{"chosen_ids": [1, 2], "rejected_ids": [1, 3]}] * 2
    assert read_index(data, None, "keep_start", progress=False)[1] == [-1, -2]


def test_a_dataset_is_read_in_chunks_in_order(monkeypatch):
    """More examples than a chunk, other columns beside, rows of any length."""
    monkeypatch.setattr("hf_prefix_patch.prefix_index._CHUNK", 2)
    pairs = [PAIR | {"chosen_ids": [n] * n, "text": "x"} for n in (3, 1, 0, 4, 2)]
    data = Dataset.from_list(pairs).select([4, 0, 1, 2, 3])
    index, _ = read_index(data, None, "keep_start", progress=False)
    sizes = [index.unique_tokens(places) for places in index.places]
    assert sizes == [7, 8, 6, 5, 9]


def test_what_a_transform_makes_of_the_columns_is_counted():
    data = Dataset.from_list([PAIR | {"chosen_ids": [n]} for n in (7, 8)])

    def with_start(batch):
        return batch | {"prompt_ids": [[9, *ids] for ids in batch["prompt_ids"]]}

    data.set_transform(with_start)
    index, _ = read_index(data, None, "keep_start", progress=False)
    assert index.unique_tokens(range(4)) == 4 + 1 + 1 + 2


def test_columns_of_the_examples_are_named_when_there_are_none_to_read():
    with pytest.raises(ValueError, match="needs chosen_ids and rejected_ids"):
        read_index(Dataset.from_list([{"prompt": "a"}]), None, "keep_start", progress=False)
