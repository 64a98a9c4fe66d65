"""What batches give a decoder to do: against sets of prefixes, TRL's collator and patched runs."""

import random

import numpy as np
import pytest
import torch
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_prefix_patch import DataCollatorWithPrefixSharing, enable_prefix_sharing
from hf_prefix_patch.workload import Pairs, total, work_of

WINDOWS = (None, 3)


def examples_of(count=11, seed=0, longest=8, vocab=2):
    """Pairs with much in common, among them several of one prompt."""
    generator = random.Random(seed)

    def draw(least=1):
        return [3 + generator.randrange(vocab) for _ in range(generator.randint(least, longest))]

    prompts = [draw(0) for _ in range(count // 2)]
    return [
        {"prompt_ids": generator.choice(prompts), "chosen_ids": draw(), "rejected_ids": draw()}
        for _ in range(count)
    ]


def rows_of(example, max_length=None, keep_end=False):
    rows = [example["prompt_ids"] + example[x] for x in ("chosen_ids", "rejected_ids")]
    cut = slice(-max_length, None) if keep_end and max_length else slice(max_length)
    return [tuple(row[cut]) for row in rows]


def pairs_seen(prefixes, window):
    return sum(min(len(prefix), window or len(prefix)) for prefix in prefixes)


def by_prefixes(examples, way):
    """Each token that is computed, as all tokens up to it."""
    units = [[row] for x in examples for row in rows_of(x)]
    if way == "in pairs":
        units = [rows_of(x) for x in examples]
    elif way == "across":
        units = [[row for x in examples for row in rows_of(x)]]
    return [p for rows in units for p in {row[: i + 1] for row in rows for i in range(len(row))}]


BATCHES = [[4, 0, 7], [3], [1, 2, 5, 6, 10], [9, 8]]


@pytest.mark.parametrize("way", ["packed", "in pairs", "across"])
def test_packed_ways(way):
    examples = examples_of()
    works = work_of(Pairs.of(examples), BATCHES, way, WINDOWS)
    for batch, work in zip(BATCHES, works, strict=True):
        prefixes = by_prefixes([examples[i] for i in batch], way)
        assert work.tokens == len(prefixes)
        assert work.pairs == {window: pairs_seen(prefixes, window) for window in WINDOWS}


def test_ways_differ():
    tokens = [
        total(work_of(Pairs.of(examples_of()), BATCHES, way)).tokens
        for way in ("padded", "packed", "in pairs", "across")
    ]
    assert tokens == sorted(set(tokens), reverse=True)


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_any_pairs(seed, size):
    """Random trees and batches, by the sets of their prefixes."""
    examples = examples_of(12, seed, longest=5)
    order = random.Random(seed).sample(range(12), 12)
    batches = [order[i : i + size] for i in range(0, 12, size)]
    for work, batch in zip(work_of(Pairs.of(examples), batches, "across"), batches, strict=True):
        prefixes = by_prefixes([examples[i] for i in batch], "across")
        assert (work.tokens, work.pairs[None]) == (len(prefixes), pairs_seen(prefixes, None))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_padded_rows_are_trls(mode):
    """Cells, completion tokens and cells that the head projects, of rows that are cut."""
    examples, limit = examples_of(longest=9), 10
    assert any(len(row) > limit for x in examples for row in rows_of(x))
    pairs = Pairs.of(examples, limit, mode)
    collator = DataCollatorForPreference(pad_token_id=0, max_length=limit, truncation_mode=mode)
    ways = {head: work_of(pairs, BATCHES, "padded", head=head) for head in ("completion", "cells")}
    for i, batch in enumerate(BATCHES):
        rows = collator([examples[j] for j in batch])
        assert ways["cells"][i].tokens == rows["input_ids"].numel()
        # As both sides shift by one: a token is predicted by the one before it.
        assert ways["completion"][i].head_tokens == rows["completion_mask"][:, 1:].sum()
        assert ways["cells"][i].head_tokens == rows["input_ids"][:, 1:].numel()
    kept = [row for x in examples for row in rows_of(x, limit, mode == "keep_end")]
    assert sorted(pairs.lengths.reshape(-1)) == sorted(map(len, kept))


def test_attention_of_padded_rows():
    """Masked squares where there is padding or a window within the row, else what is visible."""
    rows = [([1, 2, 3], [4], [5]), ([1, 2], [6, 7], [8]), ([1], [2], [3])]
    examples = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), r, strict=True)) for r in rows
    ]
    batches, windows = [[0], [1], [0, 1], [2]], (None, 3, 4)
    sdpa = work_of(Pairs.of(examples), batches, "padded", windows)
    assert [work.pairs[None] for work in sdpa] == [2 * 10, 2 * 16, 4 * 16, 2 * 3]
    assert [work.pairs[3] for work in sdpa] == [2 * 16, 2 * 16, 4 * 16, 2 * 3]
    assert [work.pairs[4] for work in sdpa] == [2 * 10, 2 * 16, 4 * 16, 2 * 3]
    flash = work_of(Pairs.of(examples), batches, "padded", windows, attention="flash")
    assert [work.pairs[None] for work in flash] == [20, 10 + 6, 36, 6]
    assert [work.pairs[3] for work in flash] == [2 * 9, 9 + 6, 18 + 15, 6]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_counts_are_those_of_patched_runs(family):
    """Batch by batch, to the token: `stats` of a patched model."""
    examples = examples_of(longest=12, vocab=3)
    works = {
        way: work_of(Pairs.of(examples, 18), BATCHES, way) for way in ("padded", "packed", "across")
    }
    model = tiny_model(family)
    collator = DataCollatorWithPrefixSharing(pad_token_id=0, max_length=18)
    for i, batch in enumerate(BATCHES):
        rows = collator([examples[j] for j in batch])
        with enable_prefix_sharing(model, verify=False) as sharing, torch.no_grad():
            model(
                input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False
            )
        stats = sharing.stats
        assert stats.calls == 1
        counted = [works[way][i].tokens for way in ("padded", "packed", "across")]
        assert counted == [stats.padded_tokens, stats.row_tokens, stats.packed_tokens]


def test_many_pairs_of_long_rows_do_not_overflow():
    long = np.arange(60_000)
    pairs = Pairs.of([{"prompt_ids": long, "chosen_ids": [i], "rejected_ids": [9]} for i in (7, 8)])
    work = total(work_of(pairs, [[0, 1]] * 3, "padded", head="cells"))
    assert work.pairs[None] == 3 * 4 * 60_001 * 60_002 // 2 > 2**33
    assert work.head_tokens == 3 * 4 * 60_000
