"""The benchmarks of batches, of the data loader and of training, on tiny data and models."""

import csv
import json
import os
import random
from argparse import Namespace
from math import log
from pathlib import Path

import numpy as np
import pytest
import transformers.modeling_utils
import trl.trainer.utils
from tiny_trl import WORDS, preference_pairs, save_tiny_model, tiny_tokenizer

from hf_prefix_patch import PrefixSharingBatchSampler, tokenize_preferences

ANSWERS = ("chosen_ids", "rejected_ids")


@pytest.fixture
def tiny(tmp_path):
    """Folder of a tiny model and its tokenizer."""
    return save_tiny_model(tmp_path / "tiny")


def write_pairs(path, examples):
    path.write_text("\n".join(map(json.dumps, examples)))
    return path


def one_prompt_several_pairs(prompts=4, pairs=4, words=20):
    """Text whose pairs come in turns of the prompts."""
    generator = random.Random(0)

    def say(count):
        return " ".join(generator.choices(WORDS, k=count))

    starts = [say(words) + " " for _ in range(prompts)]
    return [
        {"prompt": prompt, "chosen": say(3), "rejected": say(5)}
        for _ in range(pairs)
        for prompt in starts
    ]


def tokenised(path):
    return tokenize_preferences(path, tiny_tokenizer(), progress=False)


def rows_of(path):
    """Token ids of prompt and answer of all pairs."""
    return [x["prompt_ids"] + x[name] for name in ANSWERS for x in tokenised(path)]


def completion_tokens_of(path):
    return sum(len(x[name]) for name in ANSWERS for x in tokenised(path))


def tables(folder):
    """Rows of the tables in a folder, by the name of their file."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        assert "torch 2." in path.with_suffix(".md").read_text()
        with path.open(newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


# Token ratios


def test_token_ratios(module, tiny, tmp_path):
    data = [*one_prompt_several_pairs(), *one_prompt_several_pairs(1, 1, words=200)]
    path = write_pairs(tmp_path / "talk.jsonl", data)
    given = ["--data", str(path), "--tokenizer", str(tiny), "--pairs", "4", "--epochs", "2"]
    budgets = ["--max-tokens", "60", "1000", "9"]
    module("token_ratios").main([*given, *budgets, "--out", str(tmp_path / "out")])
    (rows,) = tables(tmp_path / "out").values()
    (chart,) = (tmp_path / "out").glob("*.png")
    assert chart.stat().st_size > 5_000
    lines = {row["batches"]: row for row in rows}
    limits = ("4 pairs", "60 tokens", "1000 tokens", "9 tokens")
    assert list(lines) == [f"{kind}, {x}" for x in limits for kind in ("random", "sampler")]
    assert [row["pairs left out"] for row in rows] == ["0", "0", "1", "1", "0", "0", "17", "17"]
    assert {lines["random, 9 tokens"][x] for x in ("ideal", "pairs per batch")} == {"-"}

    def ratio(name, column="row tokens / unique token"):
        return float(lines[name][column])

    for limit in limits[:2]:
        shared = ratio(f"sampler, {limit}")
        assert 1 < ratio(f"random, {limit}") < 0.9 * shared
        assert shared <= ratio(f"sampler, {limit}", "ideal")
    for name in ("random, 60 tokens", "sampler, 60 tokens"):
        filled = (ratio(name, x) for x in ("share of budget filled", "ideal share"))
        assert 0.5 < next(filled) <= next(filled) <= 1


def test_one_batch_of_everything_is_the_ideal(module, tiny, tmp_path):
    """Counted by hand: with the whole set in one batch, each kind has the same."""
    path = write_pairs(tmp_path / "talk.jsonl", one_prompt_several_pairs())
    given = ["--data", str(path), "--tokenizer", str(tiny), "--max-tokens", "9999"]
    module("token_ratios").main([*given, "--pairs", "16", "--out", str(tmp_path / "out")])
    (lines,) = tables(tmp_path / "out").values()
    rows = rows_of(path)
    unique = module("pairs").distinct_prefixes(rows)
    assert len(lines) == 4
    for line in lines:
        assert float(line["pairs per batch"]) == 16
        assert float(line["unique tokens / batch"]) == unique
        cells = len(rows) * max(map(len, rows))
        assert float(line["padded cells / unique token"]) == pytest.approx(cells / unique)
        for column in ("row tokens / unique token", "ideal"):
            assert float(line[column]) == pytest.approx(sum(map(len, rows)) / unique)
        filled = line["share of budget filled"]
        assert filled == line["ideal share"]
        assert filled == "-" or float(filled) == pytest.approx(unique / 9999)


def test_random_batches_fill_the_budget(module, tmp_path):
    path = write_pairs(tmp_path / "talk.jsonl", one_prompt_several_pairs())
    sampler = PrefixSharingBatchSampler(tokenised(path), 100)
    batches = list(module("token_ratios").random_under_budget(sampler, range(16), 100, epochs=2))
    assert sorted(i for batch in batches for i in batch) == sorted([*range(16)] * 2)
    assert all(sampler.unique_tokens(batch) <= 100 for batch in batches)
    ends = [i for i, batch in enumerate(batches) if sampler.unique_tokens(batch) < 70]
    assert len(ends) <= 2  # the last ones of the epochs
    assert batches[0] != batches[len(batches) // 2]


# The data loader


def test_planning(module, tiny, tmp_path):
    """All three tables; what they count, against the rows of the file."""
    path = write_pairs(tmp_path / "talk.jsonl", one_prompt_several_pairs())
    small = ["--rows", "4", "--length", "64", "--repeats", "1", "--pairs-in-set", "40"]
    given = ["--data", str(path), "--tokenizer", str(tiny), "--pairs", "16"]
    module("planning").main([*small, *given, "--out", str(tmp_path / "out")])
    batching, collating, planning = tables(tmp_path / "out").values()
    assert [row["packed tokens"] for row in planning] == ["160", "112", "256"]
    lines = {row["batch"]: row for row in collating}
    rows = rows_of(path)
    talk = lines["talk"]
    sizes = [float(talk[x]) for x in ("rows", "row tokens", "packed tokens")]
    assert sizes == [32, sum(map(len, rows)), module("pairs").distinct_prefixes(rows)]
    assert float(lines["16 rows of 4096"]["row tokens"]) == 16 * 4096
    branches = lines["64 rows of many branches"]
    assert float(branches["segments"]) > 120
    assert float(branches["packed tokens"]) < 0.6 * float(branches["row tokens"])
    for row in collating:
        for kind in ("plan alone", "collate and plan, rows", "collate and plan, packed"):
            rate = float(row["row tokens"]) / float(row[f"{kind}: ms"]) / 1e3
            assert float(row[f"{kind}: million row tokens per s"]) == pytest.approx(rate)
    assert [row["limit"] for row in batching] == ["max_tokens=4096", "max_pairs=8"]
    assert int(batching[1]["batches"]) >= 5
    assert all(0 < float(row["both s"]) < float(row["target s"]) for row in batching)


# Training


@pytest.fixture
def work_of_runs(module, monkeypatch):
    """By run, once `training` ran here: most tokens in TRL's LM head, and checkpointed calls."""
    heads, layers, found = [], [], {}
    project = trl.trainer.utils._ChunkedLogProbFunction.apply
    checkpoint = transformers.modeling_utils.checkpoint

    def head(hidden, *rest):
        heads.append(len(hidden))
        return project(hidden, *rest)

    def layer(*args, **kwargs):
        layers.append(1)
        return checkpoint(*args, **kwargs)

    def in_this_process(call, run, *args):
        heads.clear()
        layers.clear()
        result = call(run, *args)
        found[run.name] = max(heads, default=0), len(layers)
        return result

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", head)
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", layer)
    monkeypatch.setattr(module("training"), "in_own_process", in_this_process)
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's options have new names
@pytest.mark.parametrize("as_trl", [True, False])
def test_training(module, monkeypatch, work_of_runs, tiny, tmp_path, as_trl):
    """Every run, on one set of pairs: equal losses, and the decoder ran on what it should."""
    monkeypatch.chdir(tmp_path)
    path = write_pairs(tmp_path / "talk.jsonl", preference_pairs(6))
    given = ["--data", str(path), "--model", str(tiny), "--device", "cpu", "--threads", "1"]
    given += ["--pairs-in-all", "6", "--batches", "2", "6", "--max-tokens", "150"]
    given += [] if as_trl else ["--completion-head", "--no-checkpointing"]
    module("training").main([*given, "--out", str(tmp_path / "out")])
    ((title, lines),) = tables(tmp_path / "out").items()
    assert ("no-checkpointing-trl-s-head-on-completion-tokens" in title) is not as_trl
    assert (tmp_path / "out" / f"{title}.png").stat().st_size > 5_000
    names = ["TRL, 2 pairs", "TRL, 6 pairs", "TRL shared, 2 pairs", "TRL shared, 6 pairs"]
    budgets = ["TRL shared, 150 tokens", "plain loop, 150 tokens"]
    assert [line["run"] for line in lines] == [*names, *budgets]

    rows, completions = rows_of(path), completion_tokens_of(path)
    tokens = {line["run"]: int(line["decoder tokens"]) for line in lines}
    cells = 12 * max(map(len, rows))
    assert tokens["TRL, 6 pairs"] == cells
    unique = module("pairs").distinct_prefixes(rows)
    assert tokens["TRL shared, 6 pairs"] == unique
    batches = [int(line["batches"]) for line in lines]
    assert batches[:4] == [3, 1, 3, 1]
    assert batches[4] == batches[5] > 1
    assert all(unique < tokens[run] <= 150 * batches[5] for run in budgets)

    for run in ("TRL, 6 pairs", "TRL shared, 6 pairs"):
        assert work_of_runs[run][0] == (cells - 12 if as_trl else completions)
    assert [bool(layers) for _, layers in work_of_runs.values()] == [as_trl] * 6

    losses = [float(line["mean loss"]) for line in lines]
    assert losses == pytest.approx([losses[0]] * 6, abs=1e-5)
    assert abs(losses[0] - log(2)) > 1e-4  # the adapter does something
    for line in lines:
        ideal, speed_up = (float(line[x]) for x in ("ideal", "speed-up"))
        assert ideal == pytest.approx(tokens["TRL, 2 pairs"] / tokens[line["run"]])
        assert speed_up == pytest.approx(float(line["pairs/s"]) / float(lines[0]["pairs/s"]))
        assert float(line["peak GiB"]) >= 0


def test_runs_with_other_losses_are_an_error(module):
    training = module("training")
    results = {f"run {x}": training.Result(1, x, 1.0, 1, 0) for x in (0.69, 0.6905)}
    with pytest.raises(RuntimeError, match=r"run 0.69 0.690000, run 0.6905 0.690500"):
        training.check_losses("talk", results, "cpu")
    training.check_losses("talk", results, "cuda")
    results["nan"] = training.Result(1, float("nan"), 1.0, 1, 0)
    with pytest.raises(RuntimeError, match="talk: the mean losses differ"):
        training.check_losses("talk", results, "cuda")


def test_pairs_that_are_too_few_or_no_multiple(module, tmp_path):
    training = module("training")
    path = write_pairs(tmp_path / "talk.jsonl", preference_pairs(6))
    given = {"batches": [2, 4], "max_length": 100}
    with pytest.raises(ValueError, match=r"--pairs-in-all is 6, but must be a multiple of .*4"):
        training.select(path, tiny_tokenizer(), Namespace(pairs_in_all=6, **given))
    with pytest.raises(ValueError, match="6 pairs with a prompt below 100 tokens"):
        training.select(path, tiny_tokenizer(), Namespace(pairs_in_all=8, **given))


def test_peak_resident(module):
    """A tensor that is gone after the call; what was there before does not count."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory is measured on Linux only")
    before = np.ones(10_000_000)  # 80 MB
    peak = module("training").peak_resident(lambda: np.ones(5_000_000).sum())
    assert peak == pytest.approx(40e6, rel=0.2)
    assert len(before)


def test_own_process(module):
    assert module("training").in_own_process(os.getpid) != os.getpid()


def test_equivalence(module, monkeypatch, tiny, tmp_path):
    """All runs, from one adapter; the shared run is as near to the unshared as more padding is."""
    monkeypatch.chdir(tmp_path)
    equivalence = module("equivalence")
    monkeypatch.setattr(equivalence, "in_own_process", lambda call, *args: call(*args))
    path = write_pairs(tmp_path / "talk.jsonl", preference_pairs(8))
    given = ["--data", str(path), "--model", str(tiny), "--threads", "1", "--out", "out"]
    equivalence.main([*given, "--steps", "4", "--every", "2", "--max-length", "100"])
    by_step, summary = tables(tmp_path / "out").values()
    assert (tmp_path / "out" / "4-steps-of-dpo-with-lora-tiny-talk.png").stat().st_size > 5_000
    names = ["unshared", "shared", "unshared, more padding", "shared, other order"]
    assert [line["run"] for line in summary] == names
    tokens = [int(line["decoder tokens"]) for line in summary]
    assert tokens[1] < tokens[0] < tokens[2]
    apart = [float(line["adapter distance"]) for line in summary]
    assert apart[0] == 0 < apart[1] < 1e-3
    assert 0 < apart[2] < 1e-3
    assert apart[3] > 0.1
    differences = [float(line["largest loss difference"]) for line in summary]
    assert differences[0] == 0
    assert max(differences[1:3]) < 1e-5 < differences[3]
    assert [line["step"] for line in by_step] == ["1", "2", "3", "4"]
    assert [bool(line["shared: adapter distance"]) for line in by_step] == [False, True] * 2
    assert float(by_step[3]["shared: adapter distance"]) == apart[1]
    with pytest.raises(ValueError, match="has 8 pairs with rows of at most 100 tokens, but 5 "):
        equivalence.main([*given, "--steps", "5", "--max-length", "100"])
