"""PrefixSharingBatchSampler: limits, sharing, shuffling, steps of several ranks, resuming."""

import random
from collections import Counter
from itertools import combinations
from statistics import mean

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from batches import tree_of_rows
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from hf_prefix_patch.columns import rows_of
from hf_prefix_patch.sampler import PrefixSharingBatchSampler as Sampler

ANSWERS = ("chosen_ids", "rejected_ids")
IDS = st.lists(st.integers(0, 1), max_size=4)
PAIRS = st.builds(
    lambda p, c, r: {"prompt_ids": p, "chosen_ids": [*c, 2], "rejected_ids": r}, IDS, IDS, IDS
)


def pairs_of(groups, prompt=(20, 40), answer=(5, 30), head=()):
    """Pairs in random order, as many with one prompt as each number says; lengths in a range."""
    rng = random.Random(0)

    def ids(lengths):
        return [rng.randrange(10, 1000) for _ in range(rng.randint(*lengths))]

    pairs = []
    for size in groups:
        start = {"prompt_ids": [*head, *ids(prompt)]}
        pairs += [start | {key: ids(answer) for key in ANSWERS} for _ in range(size)]
    rng.shuffle(pairs)
    return pairs


def prompts_of(batch, pairs):
    return Counter(tuple(pairs[index]["prompt_ids"]) for index in batch)


def packed_tokens(examples, *cut):
    """Of the right-padded rows, by `PrefixTree`."""
    rows = [row.ids for example in examples for row in rows_of(example, *cut)]
    return tree_of_rows(rows).packed_tokens


def epochs(sampler, count):
    """Batches of the first epochs."""
    return [list(sampler) for _ in range(count)]


def indices(batches):
    return sorted(index for batch in batches for index in batch)


def tokens_of(sampler, batches):
    return [sampler.unique_tokens(batch) for batch in batches]


@given(
    st.lists(PAIRS, min_size=1, max_size=9),
    st.integers(1, 5),
    st.sampled_from(["keep_start", "keep_end"]),
    st.integers(0, 20),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=200)
def test_budget_coverage_and_size_are_exact(pairs, max_length, mode, spare, seed):
    """Rows that are ragged, identical, nested or cut on either side."""
    budget = max(packed_tokens([pair], max_length, mode) for pair in pairs) + spare
    sampler = Sampler(pairs, budget, max_length=max_length, truncation_mode=mode, seed=seed)
    for batches in epochs(sampler, 2):
        assert indices(batches) == list(range(len(pairs)))
        assert len(batches) == len(sampler)
        for batch in batches:
            packed = packed_tokens([pairs[index] for index in batch], max_length, mode)
            assert sampler.unique_tokens(batch) == packed <= budget


def test_batches_are_filled():
    """Single pairs, with a limit of either kind and with both."""
    pairs = pairs_of([1] * 100)
    total = packed_tokens(pairs)
    assert len(Sampler(pairs, max_pairs=8)) == 13
    assert len(Sampler(pairs, 1000)) <= 1.1 * total / 1000 + 1
    both = Sampler(pairs, 500, max_pairs=8)
    sizes = [(len(batch), both.unique_tokens(batch)) for batch in both]
    assert max(pairs for pairs, _ in sizes) == 8
    assert 480 < max(tokens for _, tokens in sizes) <= 500
    assert both.pairs_per_batch == mean(pairs for pairs, _ in sizes)


def test_pairs_with_one_prompt_come_together():
    """Groups that fit are whole in every epoch, and much more is shared than at random."""
    pairs = pairs_of([4] * 20)
    sampler = Sampler(pairs, max_pairs=8)
    for batches in epochs(sampler, 3):
        assert all(set(prompts_of(batch, pairs).values()) == {4} for batch in batches)
    drawn = [range(start, start + 8) for start in range(0, 80, 8)]
    assert sum(tokens_of(sampler, batches)) < 0.75 * sum(tokens_of(sampler, drawn))


def test_a_long_common_prefix_brings_prompts_together():
    """Two questions on each document: four pairs, two prompts, one batch."""
    pairs = []
    for document in pairs_of([1] * 6, prompt=(80, 80)):
        for question in (1, 2):
            prompt = {"prompt_ids": document["prompt_ids"] + [question] * 5}
            pairs += [document | prompt | {"chosen_ids": [answer]} for answer in (3, 4)]
    for batch in Sampler(pairs, max_pairs=4):
        assert len({tuple(pairs[index]["prompt_ids"][:80]) for index in batch}) == 1


def test_a_group_larger_than_a_batch_fills_batches():
    pairs = pairs_of([20, 1, 1, 1, 1])
    largest = prompts_of(range(24), pairs).most_common(1)[0][0]
    found = [prompts_of(batch, pairs)[largest] for batch in Sampler(pairs, max_pairs=8)]
    assert sorted(found) == [4, 8, 8]


def test_groups_are_packed_tightly():
    """Forty of five pairs and forty of three in batches of eight."""
    pairs = pairs_of([5, 3] * 40, prompt=(90, 90))
    assert 40 <= len(Sampler(pairs, max_pairs=8, shuffle=False)) <= 42


def test_a_group_is_cut_only_where_that_costs_little():
    """Groups of five in batches of eight: a prompt may be paid twice if it is short."""
    short = Sampler(pairs_of([5] * 16, prompt=(2, 2)), max_pairs=8)
    assert [len(batch) for batch in short] == [8] * 10
    long = Sampler(pairs_of([5] * 16, prompt=(90, 90)), max_pairs=8)
    assert [len(batch) for batch in long] == [5] * 16


def test_pairs_per_prompt_are_limited():
    """Also where one prompt has more pairs than any batch may take, and where it was cut off."""
    pairs = pairs_of([9, 4, 4, 3, 2, 1, 1])
    free = Sampler(pairs, max_pairs=8, max_length=10)
    assert max(max(prompts_of(batch, pairs).values()) for batch in free) > 2
    sampler = Sampler(pairs, max_pairs=8, max_length=10, max_pairs_per_prompt=2)
    for batches in epochs(sampler, 3):
        assert indices(batches) == list(range(24))
        assert max(max(prompts_of(batch, pairs).values()) for batch in batches) == 2


def ragged():
    """Groups and pairs of many sizes, so that packings differ in their number of batches."""
    return pairs_of([1, 2, 3, 4, 5, 6, 7] * 6, answer=(1, 60))


@pytest.mark.parametrize("budget", [400, 700])
def test_every_epoch_has_the_same_number_of_batches(budget):
    """Packings of either budget differ by a batch or two, from the first one down or up."""
    sampler = Sampler(ragged(), budget)
    for batches in epochs(sampler, 20):
        assert len(batches) == len(sampler)
        assert indices(batches) == list(range(168))
        assert max(tokens_of(sampler, batches)) <= budget


def test_an_epoch_of_too_many_batches_takes_those_of_the_first(monkeypatch):
    """One packing a try and none to spare: some epochs need more than the first has."""
    monkeypatch.setattr("hf_prefix_patch.sampler._TRIALS", 1)
    found = epochs(Sampler(ragged(), 700), 20)
    first = {frozenset(batch) for batch in found[0]}
    again = [batches for batches in found[1:] if {frozenset(batch) for batch in batches} == first]
    assert 0 < len(again) < 19
    assert all(batches != found[0] for batches in again)
    assert {len(batches) for batches in found} == {len(found[0])}


def test_the_largest_batch_is_split():
    """Where the number of batches must grow, here from three to a multiple of four."""
    for longest in range(6):
        pairs = pairs_of([1] * 6)
        pairs[longest]["chosen_ids"] = [1] * 99
        three = list(Sampler(pairs, max_pairs=2))
        sampler = Sampler(pairs, max_pairs=2, num_replicas=4)
        largest = max(three, key=sampler.unique_tokens)
        want = [batch for batch in three if batch is not largest] + [[index] for index in largest]
        assert sorted(sampler) == sorted(want)


def test_epochs_differ_and_repeat_by_seed():
    pairs = ragged()
    found = epochs(Sampler(pairs, 600), 3)
    assert found == epochs(Sampler(pairs, 600), 3)
    assert found == epochs(Sampler(Dataset.from_list(pairs), 600), 3)
    assert found[0] != epochs(Sampler(pairs, 600, seed=1), 1)[0]
    compositions = [{frozenset(batch) for batch in batches} for batches in found]
    for one, other in combinations(compositions, 2):
        assert len(one & other) < len(one) / 2


def test_pairs_that_share_nothing_special_meet_by_chance():
    """After a header that all have, every second pair begins with the same two tokens."""
    pairs = pairs_of([1] * 48, head=[1] * 30)
    for pair in pairs[::2]:
        pair["prompt_ids"][30:32] = [2, 2]
    sampler = Sampler(pairs, max_pairs=6)
    count, places = 200, set()
    met = Counter()
    for batches in epochs(sampler, count):
        met.update(pair for batch in batches for pair in combinations(sorted(batch), 2))
        places.add(next(at for at, batch in enumerate(batches) if 0 in batch))
    chance = count * 5 / 47
    alike = mean(met[pair] for pair in combinations(range(0, 48, 2), 2))
    assert alike == pytest.approx(chance, rel=0.1)
    assert max(met.values()) < 3 * chance
    assert len(met) == 48 * 47 / 2
    assert len(places) == len(sampler)


def test_without_shuffling_every_epoch_is_the_same():
    """And batches follow the data, by their first pair."""
    sampler = Sampler(ragged(), 600, shuffle=False)
    first, second = epochs(sampler, 2)
    assert first == second
    assert indices(first) == list(range(168))
    starts = [min(batch) for batch in first]
    assert starts == sorted(starts)


def test_a_step_has_batches_of_similar_size_for_each_rank():
    pairs = pairs_of([1] * 100, answer=(1, 200))
    whole = Sampler(pairs, max_pairs=3, num_replicas=4)
    parts = [Sampler(pairs, max_pairs=3, num_replicas=4, rank=rank) for rank in range(4)]
    batches = list(whole)
    assert len(whole) == 36  # 34 batches would do
    assert indices(batches) == list(range(100))
    for rank, part in enumerate(parts):
        assert len(part) == 9
        assert list(part) == batches[rank::4]
    tokens = tokens_of(whole, batches)
    steps = [tokens[start : start + 4] for start in range(0, 36, 4)]
    assert max(tokens) > 1.4 * mean(tokens)
    assert mean(max(step) / mean(step) for step in steps) < 1.1
    sizes = [sum(step) for step in steps]
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))
    assert any(step != sorted(step) for step in steps)


def test_the_longest_batch_comes_first():
    pairs = pairs_of([1] * 60, answer=(1, 200))
    for replicas in (1, 3):
        sampler = Sampler(pairs, max_pairs=3, num_replicas=replicas, longest_first=True)
        for batches in epochs(sampler, 5):
            tokens = tokens_of(sampler, batches)
            assert max(tokens) in tokens[:replicas]
            assert indices(batches) == list(range(60))


def test_pairs_over_the_budget_are_named():
    pairs = pairs_of([1] * 10, prompt=(10, 10), answer=(5, 5))
    for index in (2, 5, 6, 8):
        pairs[index]["chosen_ids"] = [1] * (100 + index)
    with pytest.raises(
        ValueError,
        match=r"max_tokens is 50, but the unique tokens of 4 pairs exceed it \(index 2 has 117, "
        r"index 5 has 120, index 6 has 121, and 1 more; up to 123\); raise max_tokens to "
        r"123, cut .*max_length.*skip",
    ):
        Sampler(pairs, 50)
    assert Sampler(pairs, 50, max_length=20).skipped == ()
    with pytest.warns(UserWarning, match="of 4 pairs exceed it .*they are left out") as caught:
        sampler = Sampler(pairs, 50, oversized="skip")
    assert [warning.filename for warning in caught] == [__file__]
    assert sampler.skipped == (2, 5, 6, 8)
    assert indices(sampler) == [0, 1, 3, 4, 7, 9]
    assert sampler.pairs_per_batch == 6 / len(sampler)


@pytest.mark.filterwarnings("ignore:max_tokens is 5:UserWarning")
def test_ranks_without_a_pair_are_refused():
    pairs = pairs_of([1, 1, 1])
    with pytest.raises(
        ValueError,
        match=r"3 pairs are within the limits \(0 exceed max_tokens\), but each of num_replicas=4",
    ):
        Sampler(pairs, max_pairs=1, num_replicas=4)
    with pytest.raises(ValueError, match=r"0 pairs are within the limits \(\d+ exceed"):
        Sampler(pairs, 5, oversized="skip")
    with pytest.raises(ValueError, match=r"3 pairs make 3 batches .*num_replicas=2; .*1 pairs out"):
        Sampler(pairs, max_pairs=1, num_replicas=2)
    assert len(Sampler(pairs, max_pairs=2, num_replicas=2)) == 2


def state(epoch, batches, sampler):
    return {"epoch": epoch, "batches": batches, "batches_per_epoch": len(sampler)}


def test_resumes_where_the_state_was_taken():
    pairs = ragged()
    whole = epochs(Sampler(pairs, 600), 3)
    stopped = Sampler(pairs, 600)
    stopped.set_epoch(1)
    batches = iter(stopped)
    taken = [next(batches) for _ in range(3)]
    assert stopped.state_dict() == state(1, 3, stopped)
    resumed = Sampler(pairs, 600)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == state(1, 3, stopped)
    # A loop over the remaining epochs says which one it is in.
    resumed.set_epoch(1)
    assert [taken + list(resumed), list(resumed)] == whole[1:]


def test_a_state_from_after_the_last_batch_has_none_left():
    pairs = ragged()
    sampler = Sampler(pairs, 600)
    whole = epochs(Sampler(pairs, 600), 2)
    sampler.load_state_dict({"epoch": 0, "batches": len(sampler)})
    assert epochs(sampler, 2) == [[], whole[1]]
    assert sampler.state_dict() == state(2, 0, sampler)


def test_a_state_is_resumed_from_once():
    """Another epoch begins at its first batch, and so does the same one when read again."""
    whole = epochs(Sampler(ragged(), 600), 2)
    sampler = Sampler(ragged(), 600)
    sampler.load_state_dict({"epoch": 0, "batches": 3})
    sampler.set_epoch(1)
    assert sampler.state_dict() == state(1, 0, sampler)
    assert list(sampler) == whole[1]
    sampler.load_state_dict({"epoch": 0, "batches": 3})
    assert next(iter(sampler)) == whole[0][3]
    assert list(sampler) == whole[0]
    sampler.load_state_dict({"epoch": 1, "batches": 0})
    assert list(sampler) == whole[1]


def test_a_state_of_other_data_is_refused():
    sampler = Sampler(ragged(), 600)
    of = len(sampler)
    for batches in (of + 1, -1):
        with pytest.raises(ValueError, match=f"the state has {batches} of {of} batches of an "):
            sampler.load_state_dict({"epoch": 0, "batches": batches})
    other = Sampler(ragged(), 1200)
    with pytest.raises(ValueError, match=f"has 0 of {len(other)} batches .* an epoch has {of};"):
        sampler.load_state_dict(other.state_dict())


@pytest.mark.needs(accelerate=">=1.14")  # before, even batches need a batch size
@pytest.mark.parametrize("processes", [2, 3])
def test_accelerate_deals_out_every_batch_once(processes):
    sampler = Sampler(ragged(), 600, num_replicas=processes)
    for epoch in range(2):
        dealt = []
        for process in range(processes):
            sampler.set_epoch(epoch)
            shard = BatchSamplerShard(sampler, processes, process, even_batches=True)
            dealt.append(list(shard))
            assert len(dealt[-1]) == len(shard) == len(sampler) / processes
        sampler.set_epoch(epoch)
        assert [batch for step in zip(*dealt, strict=True) for batch in step] == list(sampler)


def test_accelerate_skips_the_first_batches():
    """In a loader prepared by accelerate and in a plain one."""
    pairs = ragged()
    whole = epochs(Sampler(pairs, 600), 2)
    for kind in (DataLoader, DataLoaderShard):
        sampler = Sampler(pairs, 600)
        loader = kind(range(168), batch_sampler=sampler, collate_fn=list)
        assert len(loader) == len(sampler)
        sampler.set_epoch(1)
        assert list(skip_first_batches(loader, 3)) == whole[1][3:]


def test_a_prepared_loader_sets_the_epoch():
    pairs = ragged()
    loader = DataLoaderShard(range(168), batch_sampler=Sampler(pairs, 600), collate_fn=list)
    loader.set_epoch(1)
    assert list(loader) == epochs(Sampler(pairs, 600), 2)[1]


def test_progress_is_shown_when_asked_for(capsys):
    Sampler(ragged(), 600)
    assert capsys.readouterr().err == ""
    Sampler(ragged(), 600, progress=True)
    assert "reading examples: 100%" in capsys.readouterr().err


PAIR = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}


class Stream(IterableDataset):
    """A stream that knows its length."""

    def __len__(self):
        return 1

    def __iter__(self):
        return iter([PAIR])


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"max_pairs_per_prompt": 0}, ValueError, "max_pairs_per_prompt is 0, but"),
        ({"max_length": 0}, ValueError, "max_length is 0, but must be at least 1"),
        ({"num_replicas": 0}, ValueError, "num_replicas is 0, but must be at least"),
        ({"rank": -1}, ValueError, "rank is -1, but must lie in"),
        ({"shuffle": "no"}, TypeError, "shuffle is 'no', but must be True or False"),
        ({"data": Stream()}, TypeError, "data is a Stream"),
        ({"data": {"train": [PAIR]}}, TypeError, "data is a dict"),
    ],
)
def test_bad_input_is_named(given, error, match):
    """More of it is in bad_input_cases."""
    with pytest.raises(error, match=match):
        Sampler(**{"data": [PAIR], "max_pairs": 1, **given})
