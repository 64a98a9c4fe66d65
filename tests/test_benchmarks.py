"""The benchmarks count right, run from end to end, and write what they say."""

import csv
import dataclasses
import json
import runpy
import sys
from argparse import Namespace
from contextlib import nullcontext
from math import inf, isfinite
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from batches import tree_of_rows
from tiny_trl import build_trainer, load, preference_pairs, save_tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from hf_prefix_patch import PrefixTree
from hf_prefix_patch.backends import varlen

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--device", "cpu", "--shape", "tiny", "--threads", "1"]


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Run a script; the rows of its table, read back, after a look at its other files."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *TINY, "--out", str(tmp_path), *arguments])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        (written,) = tmp_path.glob("*.csv")
        text = written.with_suffix(".md").read_text()
        assert "torch 2." in text
        assert "tiny decoder" in text
        assert written.with_suffix(".png").stat().st_size > 5_000
        with written.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(f"| {name} |" in text for name in rows[0])
        return rows

    return run


def failing_run(main, arguments, out, failed):
    """The rows and the text of the table that a run leaves of which a part fails."""
    with pytest.raises(SystemExit, match=f"failed: {failed}"):
        main([*TINY, *arguments, "--out", str(out)])
    (path,) = out.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file)), path.with_suffix(".md").read_text()


def assert_positive(row, *names):
    for name in names:
        assert isfinite(float(row[name])), name
        assert float(row[name]) > 0, name


# The arithmetic


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_step_flops(module, frozen, head):
    """Against torch's count of an eager step, whose attention computes all pairs."""
    decoder = module("decoder")
    model = decoder.build_decoder(
        "tiny", "cpu", torch.float32, attention="eager", head=head, frozen=frozen
    )
    ids = torch.arange(48).view(2, 24)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)[0].sum().backward()
    got = decoder.step_flops(
        model.config, ids.numel(), 2 * 24 * 24, head_tokens=head * ids.numel(), frozen=frozen
    )
    assert got == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_checkpointing_repeats_the_forward(module):
    decoder = module("decoder")
    config = decoder.build_decoder("tiny", "cpu", torch.float32).config
    plain, repeated = (decoder.step_flops(config, 7, 28, checkpointing=x) for x in (False, True))
    assert repeated / plain == pytest.approx(4 / 3)


def test_visible_pairs(module):
    """Against masks: each row's own, and the ancestors of each packed token."""
    decoder = module("decoder")
    rows = [[5, 6, 7, 8, 9], [5, 6, 1, 2], [5, 6, 7], [3, 4], [5, 6, 7, 8, 1, 1]]
    tree = tree_of_rows(rows)
    packed = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    assert tree.packed_tokens == len(packed)
    seen = sum(q[: len(k)] == k for q in packed for k in packed)
    assert decoder.tree_pairs(tree) == seen
    lengths = [len(row) for row in rows]
    assert decoder.row_pairs(lengths) == sum(torch.ones(n, n).tril().sum() for n in lengths)


# Pairs


@pytest.mark.parametrize(
    ("length", "ratio"), [(1160, 1.59), (186, 2.15), (416, 11.14), (409, 0.42)]
)
@pytest.mark.parametrize("count", [8, 32])
def test_synthetic_pairs_have_the_medians(module, count, length, ratio):
    pairs = module("pairs").synthetic_pairs(count, length, ratio, 0.5, 512)
    answers = [(p, x) for p in pairs for x in (p.chosen, p.rejected)]
    assert median(len(p.prompt) + len(x) for p, x in answers) == pytest.approx(length, rel=0.06)
    assert median(len(p.prompt) / len(x) for p, x in answers) == pytest.approx(ratio, rel=0.06)
    assert len({len(p.prompt) for p in pairs}) > count / 2
    assert any(len(p.chosen) != len(p.rejected) for p in pairs)


def test_packed_tokens_of_the_modes(module):
    """Two pairs of one prompt, counted by hand, and each mode as the library packs it."""
    pairs = module("pairs")
    prompt = [300, 301, 302]
    batch = pairs.collate(
        [
            pairs.Pair(prompt, [310, 311], [310, 320, 321]),  # the answers begin alike
            pairs.Pair(prompt, [330], [310, 311, 340]),  # as an answer of the other pair
        ],
        max_length=100,
    )
    tokens = {}
    for mode in pairs.MODES:
        rows, tokens[mode] = pairs.in_mode(batch, mode)
        tree = PrefixTree.from_rows(rows.input_ids, rows.attention_mask)
        assert tokens[mode] == (tree.padded_tokens if mode == "padded" else tree.packed_tokens)
    # Rows of 5, 4, 6 and 6 tokens, chosen first.
    assert tokens == {"padded": 24, "packed": 21, "in pairs": 7 + 7, "across": 9}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("max_length", [40, 128])
def test_real_pairs_become_the_rows_of_trl(module, tmp_path, max_length):
    pairs = module("pairs")
    options = {"max_length": max_length, "per_device_eval_batch_size": 3}
    trainer = build_trainer(load(save_tiny_model(tmp_path)), tmp_path, **options)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, preference_pairs(8, seed=1))))
    read = pairs.read_pairs(path, tiny_tokenizer(), 3, max_length, shuffle=False)
    batch = pairs.collate(read, max_length)
    for name, want in next(iter(trainer.get_eval_dataloader())).items():
        torch.testing.assert_close(getattr(batch, name), want.long(), msg=name)


def test_pairs_of_strings(module, tmp_path):
    pairs = module("pairs")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "w1 w2 ", "chosen": "w3", "rejected": "w4 w5 <eos>"}))
    (pair,) = pairs.read_pairs(path, tiny_tokenizer(), 1, 100)
    texts = [tiny_tokenizer().decode(x) for x in (pair.prompt, pair.chosen, pair.rejected)]
    assert texts == ["w1 w2", "w3 <eos>", "w4 w5 <eos>"]  # as TRL ends them
    with pytest.raises(ValueError, match="raise --max-length"):
        pairs.read_pairs(path, tiny_tokenizer(), 1, 2)


def test_renumbered_pairs_are_equal_where_they_were(module):
    pairs = module("pairs")
    (pair,) = pairs.renumber([pairs.Pair([9000, 7], [9000, 9000], [8])], vocab=300)
    assert pair == pairs.Pair([258, 256], [258, 258], [257])
    with pytest.raises(ValueError, match="--vocab 259 or more"):
        pairs.renumber([pair], vocab=258)


# Memory


def test_peak_memory_repeats_and_grows_with_the_tokens(module):
    grid, measure, decoder = module("grid"), module("measure"), module("decoder")
    model = decoder.build_decoder("tiny", "cpu", torch.float32)
    peaks = []
    for prompt in (64, 64, 128):
        rows = grid.random_pair(prompt, 16, model)
        peaks.append(measure.peak_memory(model, lambda rows=rows: grid.step(model, *rows)))
    assert peaks[0] == peaks[1]
    assert peaks[2] == pytest.approx(peaks[0] * 144 / 80, rel=0.1)


@pytest.mark.parametrize(
    "peak",
    [
        lambda p: 1 + p / 1000,
        lambda p: p / 5000 + (p / 3000) ** 2,
        lambda p: inf if p > 900 else 0.001 * p,
    ],
    ids=["line", "curve", "out of memory"],
)
def test_longest_prompt(module, peak):
    """Against trying all of them, in far fewer steps."""
    memory = module("memory")
    measured = memory.bracket(peak, 1.9, grain=10, limit=100_000)
    want = max(p for p in range(10, 100_001, 10) if peak(p) <= 1.9)
    assert memory.longest(measured, 1.9) == want
    assert measured[want + 10] > 1.9
    assert len(measured) < 20


@pytest.mark.parametrize("budget", [0.5, 200.0])
def test_a_budget_out_of_reach(module, budget):
    with pytest.raises(ValueError, match="outside of 10 to 100000 prompt tokens"):
        module("memory").bracket(lambda p: 1 + p / 1000, budget, grain=10, limit=100_000)


# The scripts


def test_grid(table, capsys):
    rows = table(
        "grid.py",
        *("--prompts", "37", "512", "--responses", "16", "64", "--repeats", "1"),
        *("--backends", "sdpa", "nonesuch"),
    )
    assert "backend nonesuch left out: " in capsys.readouterr().out
    assert [(row["prompt"], row["response"], row["backend"]) for row in rows] == [
        (prompt, response, "sdpa") for prompt in ("37", "512") for response in ("16", "64")
    ]
    for row in rows:
        assert_positive(row, "unshared ms", "shared ms", "speed-up", "share of ideal")
        assert 1 < float(row["ideal"]) < float(row["token bound"]) < 2
        assert 0 < float(row["shared GiB"]) < float(row["unshared GiB"])
        assert float(row["error"]) < 1e-5
    assert [row["flash-pref"] for row in rows] == ["-", "-", "-", "1.43"]


def test_grid_beside_published_figures(module):
    """Those are over flash attention, which need not be the fastest unshared run."""
    grid = module("grid")
    plain, seconds = ["unshared", "unshared torch flash"], {"unshared": 3.0, "sdpa": 2.0}
    missing = dict.fromkeys([*plain, "sdpa"], "OOM")

    def line(seconds):
        cell = grid.Cell(seconds, {}, {}, missing)
        (found,) = grid.cell_lines(cell, (512, 64), plain, ["sdpa"], 1.6)
        return dict(zip(grid.HEADER, found, strict=True))

    found = line(seconds | {"unshared torch flash": 4.0})
    assert [found[x] for x in ("speed-up", "over flash", "flash-pref")] == [1.5, 2.0, 1.43]
    assert found["unshared flash ms"] == 4e3
    found = line(seconds)
    assert [found[x] for x in ("speed-up", "over flash")] == [1.5, "OOM"]


def test_a_side_has_its_kernel_alone(module):
    measure = module("measure")
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    with measure.Side("a side", kernel=measure.SDPBackend.FLASH_ATTENTION).on(model):
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


def test_grid_reports_what_runs_out_of_memory(module, monkeypatch, tmp_path):
    grid = module("grid")
    step = grid.step

    def step_in_small_memory(model, ids, direction):
        if ids.shape[1] > 150 and model.config._attn_implementation == "sdpa":
            patched = any(hook for hook in model._forward_pre_hooks)
            if not patched:
                raise torch.OutOfMemoryError
        step(model, ids, direction)

    monkeypatch.setattr(grid, "step", step_in_small_memory)
    sizes = ["--prompts", "64", "160", "--responses", "16", "--repeats", "1"]
    grid.main([*TINY, *sizes, "--out", str(tmp_path)])
    with next(tmp_path.glob("*.csv")).open(newline="") as file:
        fits, fails = csv.DictReader(file)
    assert_positive(fits, "unshared ms", "shared ms", "speed-up")
    assert [fails[x] for x in ("unshared ms", "unshared GiB", "speed-up")] == ["OOM"] * 3
    assert_positive(fails, "shared ms", "shared GiB", "ideal")


def test_grid_goes_on_after_an_error(module, monkeypatch, tmp_path):
    """A cell that fails says so in the table, which is there before the next cell, and at exit."""
    grid = module("grid")
    step, lines = grid.step, []

    def failing_step(model, ids, direction):
        lines.append(sum(len(x.read_text().splitlines()) for x in tmp_path.glob("*.csv")))
        if ids.shape[1] == 80 and model._forward_pre_hooks:
            raise ValueError("out of registers\nand more")
        step(model, ids, direction)

    monkeypatch.setattr(grid, "step", failing_step)
    sizes = ["--prompts", "64", "96", "--responses", "16", "--repeats", "1"]
    (fails, works), text = failing_run(grid.main, sizes, tmp_path, r"sdpa at 64 \+ 16 tokens")
    assert {0, 2} <= set(lines)  # no table at first; then its header and the first cell
    assert [fails[x] for x in ("shared ms", "shared GiB", "speed-up")] == ["failed"] * 3
    assert_positive(fails, "unshared ms", "unshared GiB", "ideal")
    assert_positive(works, "unshared ms", "shared ms", "speed-up", "error")
    assert "; sdpa at 64 + 16 tokens failed: ValueError: out of registers;" in text
    (chart,) = tmp_path.glob("*.png")
    assert chart.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("error", "word"), [(ValueError("bad kernel"), "failed"), (torch.OutOfMemoryError(), "OOM")]
)
def test_attempts(module, capsys, error, word):
    """Memory that runs out is no failure; another error sets the exit status."""
    attempts = module("measure").Attempts()

    def fail():
        raise error

    assert attempts("one", lambda: 5) == 5
    assert attempts("other", fail) is None
    assert attempts.word("other") == word
    if word == "OOM":
        assert attempts.note() == ""
        attempts.finish()
    else:
        assert attempts.note() == "; other failed: ValueError: bad kernel"
        assert "bad kernel" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="failed: other"):
            attempts.finish()


def test_sets_go_on_after_an_error(module, monkeypatch, tmp_path):
    sets = module("preference_sets")
    measure = sets.measure

    def failing(model, batches, args, name):
        if name == "HH-RLHF":
            raise ValueError("bad kernel")
        return measure(model, batches, args, name)

    monkeypatch.setattr(sets, "measure", failing)
    given = ["--sets", "HH-RLHF", "TLDR", "--batches", "1", "--repeats", "2"]
    (fails, works), text = failing_run(sets.main, given, tmp_path, "HH-RLHF")
    assert [fails[x] for x in ("padded s", "all: ideal", "across GiB")] == ["failed"] * 3
    assert_positive(fails, "prompt", "completion", "paper: sharing")
    assert_positive(works, "padded s", "all: ideal", "across GiB")
    assert "median of 2 for each batch" in text
    assert "HH-RLHF failed: ValueError: bad kernel" in text


def test_synthetic_sets(table):
    rows = table("preference_sets.py", "--sets", "HH-RLHF", "TLDR", "--batches", "1")
    assert [row["set"] for row in rows] == ["HH-RLHF", "TLDR"]
    assert [row["paper: sharing"] for row in rows] == ["1.41", "1.35"]
    for row in rows:
        for ratio in ("packing", "sharing in pairs", "sharing across", "all"):
            assert_positive(row, ratio)
            assert float(row[f"{ratio}: ideal"]) > 1
        peaks = [float(row[f"{mode} GiB"]) for mode in ("padded", "packed", "in pairs")]
        assert peaks == sorted(peaks, reverse=True)
        assert float(row["loss difference"]) < 1e-5


def test_sets_from_files(table, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, preference_pairs())))
    given = ["--data", str(path), "--tokenizer", str(tmp_path / "tokenizer"), "--keep-order"]
    (row,) = table("preference_sets.py", *given, "--pairs", "4", "--batches", "2")
    assert (row["set"], row["paper: sharing"]) == ("talk", "-")
    # All its conversations have one system prompt.
    assert float(row["sharing across: ideal"]) > float(row["sharing in pairs: ideal"]) > 1
    whole = float(row["packing: ideal"]) * float(row["sharing across: ideal"])
    assert float(row["all: ideal"]) == pytest.approx(whole)
    assert float(row["loss difference"]) < 1e-5


def test_flops_of_a_mode(module):
    """The head runs on the predictions of completion tokens, the decoder on cells or segments."""
    sets, pairs, decoder = module("preference_sets"), module("pairs"), module("decoder")
    config = decoder.build_decoder("tiny", "cpu", torch.float32, head=True).config
    batch = pairs.collate([pairs.Pair([300, 301], [302], [303, 304])], max_length=10)
    options = {"checkpointing": True, "frozen": True}
    padded, across = (sets.mode_flops(config, batch, x, **options) for x in ("padded", "across"))
    assert padded == decoder.step_flops(config, 8, 2 * 10, head_tokens=3, **options)
    assert across == decoder.step_flops(config, 5, 3 + 3 + 7, head_tokens=3, **options)


def test_a_mode_that_runs_on_other_tokens_is_an_error(module):
    sets, pairs, measure = module("preference_sets"), module("pairs"), module("measure")
    model = module("decoder").build_decoder("tiny", "cpu", torch.float32, head=True)
    batch = pairs.collate([pairs.Pair([300, 301], [302], [303, 304])], max_length=10)
    with pytest.raises(RuntimeError, match="ran on 5 tokens, not on 7"):
        sets.first_step(model, measure.Side("packed", "sdpa"), batch, tokens=7)


def test_memory(table):
    small = ["--budget", "0.004", "--response", "16", "--grain", "8"]
    rows = table("memory.py", *small)
    assert [row["checkpointing"] for row in rows] == ["off", "on"]
    for row in rows:
        assert 1 < float(row["ratio"]) <= float(row["ideal"]) == 2
        assert 0 < float(row["unshared GiB"]) <= 0.004
        assert 0 < float(row["shared GiB"]) <= 0.004
    assert int(rows[1]["unshared prompt"]) > int(rows[0]["unshared prompt"])


def test_images(table):
    sizes = ["--images", "16", "64", "--responses", "8", "--repeats", "1"]
    rows = table("images.py", *sizes)
    assert [(row["image tokens"], row["response"]) for row in rows] == [("16", "8"), ("64", "8")]
    for row in rows:
        assert_positive(row, "unshared ms", "shared ms", "speed-up", "share of ideal")
        # The tower of this shape gains 2, the decoder less.
        assert 1 < float(row["token bound"]) < 2
        assert 1 < float(row["ideal"]) < 2
        assert 0 < float(row["shared GiB"]) < float(row["unshared GiB"])
        assert float(row["error"]) < 1e-5


def test_images_that_share_nothing(module, monkeypatch, tmp_path):
    images = module("images")
    random_pair = images.random_pair

    def apart(model, image, response):
        pair = random_pair(model, image, response)
        pair.inputs["pixel_values"][0] += 1
        return pair

    monkeypatch.setattr(images, "random_pair", apart)
    sizes = ["--images", "16", "--responses", "8", "--repeats", "1"]
    failed = "an image of 16 and responses of 8 tokens"
    (row,), text = failing_run(images.main, sizes, tmp_path, failed)
    assert row["speed-up"] == "failed"
    assert "nothing was shared" in text
    with pytest.raises(ValueError, match="an image of 17 tokens is no square"):
        images.main([*TINY, "--images", "17"])
    with pytest.raises(ValueError, match="no vision tower for --shape 135m"):
        images.main(["--device", "cpu", "--shape", "135m"])


def test_memory_goes_on_after_an_error(module, monkeypatch, tmp_path):
    memory = module("memory")
    search = memory.search

    def failing(model, side, args, name):
        if name == "shared, checkpointing off":
            raise ValueError("bad kernel")
        return search(model, side, args, name)

    monkeypatch.setattr(memory, "search", failing)
    small = ["--budget", "0.004", "--response", "16", "--grain", "8"]
    failed = "shared, checkpointing off"
    (fails, works), _ = failing_run(memory.main, small, tmp_path, failed)
    assert [fails[x] for x in ("shared prompt", "ratio", "shared GiB")] == ["failed"] * 3
    assert_positive(fails, "unshared prompt", "unshared GiB")
    assert_positive(works, "ratio", "shared GiB")


def test_versions_of_what_is_installed(module):
    release = torch.__version__.partition("+")[0]  # builds for a GPU may be told apart after it
    assert module("report").versions("no-such-package", "torch").startswith(f"torch {release}")


def test_results_go_to_a_folder(module, tmp_path, capsys):
    """Said before anything is measured, not when the first table is written."""
    folder, file = tmp_path / "new" / "results", tmp_path / "table.md"
    file.touch()
    assert module("report").results_folder(str(folder)) == folder
    for path in (file, file / "below"):
        with pytest.raises(SystemExit):
            module("attention").main(["--out", str(path)])
        assert f"{file} is a file, and results need a folder" in capsys.readouterr().err


def test_inputs_of_attention_are_laid_out_by_tokens(module):
    """On both sides, as models hand them on: flat rows and packed tokens are views."""
    attention = module("attention")
    args = Namespace(device="cpu", dtype=torch.float32, heads=3, kv_heads=1, size=8)
    tree = attention.tree_of(40, 8, 2)
    packed = attention.random_inputs(tree, args)
    assert [x.shape for x in packed] == [(1, 3, 56, 8), (1, 1, 56, 8), (1, 1, 56, 8)]
    for x in packed:
        rows = attention.rows_of(tree, x)
        torch.testing.assert_close(rows.transpose(1, 2), tree.unpack(x.transpose(1, 2)))
        for y in (x, rows):
            assert y.is_leaf
            assert y.requires_grad
            assert y.transpose(1, 2).flatten(0, 1).data_ptr() == y.data_ptr()
            assert y.transpose(1, 2).is_contiguous()


def test_attention(module, tmp_path):
    """The backend computes what the rows do, and the ideal counts what is visible."""
    sizes = ["--heads", "3", "--kv-heads", "1", "--size", "8", "--repeats", "1", "--threads", "1"]
    cases = ["40x8x2", "5x4x3"]
    module("attention").main(["--device", "cpu", *sizes, "--cases", *cases, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.csv")
    assert path.stem == "attention-alone-on-cpu-1-threads"
    assert path.with_suffix(".png").stat().st_size > 5_000
    assert "torch 2." in path.with_suffix(".md").read_text()
    with path.open(newline="") as file:
        calls = list(csv.DictReader(file))
    assert [row["call"] for row in calls] == ["sdpa", "sdpa"]
    for row, (p, r, g) in zip(calls, [(40, 8, 2), (5, 4, 3)], strict=True):
        alone = g * sum(range(1, p + r + 1))
        shared = sum(range(1, p + 1)) + g * sum(range(p + 1, p + r + 1))
        assert float(row["ideal"]) == pytest.approx(alone / shared)
        assert float(row["error"]) < 1e-5
        assert float(row["speed-up"]) == pytest.approx(1 / float(row["time ratio"]))


def test_gathering(module, tmp_path):
    """Three ways, each checked against the others, and a case with nothing to gather."""
    gathering = module("gathering")
    args = ["--device", "cpu", "--kv-heads", "1", "--size", "8", "--repeats", "1"]
    given = [*args, "--threads", "1", "--cases", "6x4x3x2", "6x4x1x2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: 6x4x1x2"):
        gathering.main(given)
    note = (tmp_path / "gathering-keys-and-values-on-cpu-1-threads.md").read_text()
    assert "6x4x1x2 failed: ValueError: a prompt has 1 responses, but must have two" in note
    with (tmp_path / "gathering-keys-and-values-on-cpu-1-threads.csv").open(newline="") as file:
        line, failed = csv.DictReader(file)
    assert int(line["keys"]) == 2 * 3 * (6 + 4)
    assert float(line["ideal"]) == 1
    times = [float(line[f"{way} ms"]) for way in ("index_select", "slices", "library")]
    assert float(line["speed-up over index_select"]) == pytest.approx(times[0] / times[2])
    assert float(line["speed-up over slices"]) == pytest.approx(times[1] / times[2])
    assert_positive(line, "index_select MiB", "slices MiB", "library MiB")
    assert failed["library ms"] == "failed"


def test_ways_of_gathering_are_held_against_each_other_in_fp64(module):
    """Of a way that rounds in half precision nothing is said; one that is wrong is found."""
    gathering = module("gathering")
    inputs, along = [torch.ones(2, 1, 4).bfloat16()], [torch.ones(3, 1, 4).bfloat16()]

    def select(x, factor=1):
        return [x.index_select(0, torch.tensor([0, 1, 0])) * factor]

    def rough(x):
        return select(x, 1 if x.dtype == torch.float64 else 2)

    gathering.check({"select": select, "rough": rough}, inputs, along)
    with pytest.raises(AssertionError):
        gathering.check({"select": select, "wrong": lambda x: select(x, 2)}, inputs, along)


def test_slices_that_are_gathered(module):
    """Those that the keys are consecutive in: of each row its prompt, then what follows."""
    gathering = module("gathering")
    tree = gathering.tree_of(6, 4, 2, 2)
    assert (tree.packed_tokens, tree.row_tokens) == (2 * 14, 4 * 10)
    keys = torch.tensor([0, 1, 2, 6, 7, 0, 1, 2, 8])
    assert gathering.consecutive(keys) == [slice(0, 3), slice(6, 8), slice(0, 3), slice(8, 9)]


def test_attention_goes_on_after_an_error(module, monkeypatch, tmp_path):
    """A call that fails, and a case that has no memory for its inputs."""
    attention = module("attention")
    first_run, rows_of = attention.first_run, attention.rows_of

    def failing(step, call, device):
        if getattr(call, "func", None) is attention.BACKENDS["sdpa"].attend:
            raise ValueError("bad kernel")
        return first_run(step, call, device)

    def in_small_memory(tree, x):
        if tree.packed_tokens == 17:
            raise torch.OutOfMemoryError
        return rows_of(tree, x)

    monkeypatch.setattr(attention, "first_run", failing)
    monkeypatch.setattr(attention, "rows_of", in_small_memory)
    sizes = ["--heads", "3", "--kv-heads", "1", "--size", "8", "--repeats", "1", "--threads", "1"]
    given = ["--device", "cpu", *sizes, "--cases", "5x4x3", "40x8x2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: 40x8x2 sdpa"):
        attention.main(given)
    (calls,) = tmp_path.glob("*.csv")
    with calls.open(newline="") as file:
        small, fails = csv.DictReader(file)
    assert [small[x] for x in ("call", "unshared ms", "error")] == ["-", "OOM", "OOM"]
    assert [fails[x] for x in ("call", "ms", "speed-up", "MiB")] == ["sdpa", *["failed"] * 3]
    assert_positive(fails, "unshared ms", "unshared MiB", "ideal")
    note = calls.with_suffix(".md").read_text()
    assert "; 40x8x2 sdpa failed: ValueError: bad kernel" in note


def test_flash_implementations(module, monkeypatch):
    """Each that is installed has a side of its own, unshared and shared, and a name."""
    measure = module("measure")
    for x, found in ((2, True), (3, False), (4, True)):
        monkeypatch.setattr(
            measure.utils, f"is_flash_attn_{x}_available", lambda found=found: found, raising=False
        )
    assert measure.flash_implementations("cpu") == []
    sides = measure.unshared_sides("cuda", torch.float32)
    assert [side.name for side in sides] == ["unshared", "unshared flash 2", "unshared flash 4"]
    assert [side.attention for side in sides][1:] == ["flash_attention_2", "flash_attention_4"]
    sides = measure.unshared_sides("cuda", torch.bfloat16)
    assert [side.name for side in sides][:2] == ["unshared", "unshared torch flash"]
    assert len(sides) == 4
    monkeypatch.setattr(measure.Side, "on", lambda side, model: nullcontext())
    model = SimpleNamespace(device=torch.device("cuda"))
    shared = measure.shared_sides(model, ["flash", "sdpa"])
    assert [(side.name, side.backend, side.attention) for side in shared] == [
        ("flash 2", "flash", "flash_attention_2"),
        ("flash 4", "flash", "flash_attention_4"),
        ("sdpa", "sdpa", "sdpa"),
    ]


def test_flash_in_the_attention_benchmark(module, monkeypatch):
    """The functions of each implementation get the rows, and packed tokens with its name."""
    attention = module("attention")
    seen = []

    def forward(q, k, v, *, attn_implementation, **options):
        seen.append((attn_implementation, tuple(q.shape), options["is_causal"]))
        return q

    flash = attention.BACKENDS["flash"]
    monkeypatch.setattr(attention, "flash_implementations", lambda device: ["flash_attention_3"])
    monkeypatch.setattr(attention, "_flash_attention_forward", forward)
    monkeypatch.setattr(varlen.hf_flash, "_flash_attention_forward", forward)
    served = dataclasses.replace(flash, unserved=lambda needs: None)
    monkeypatch.setitem(attention.BACKENDS, "flash", served)
    args = Namespace(device="cpu", dtype=torch.bfloat16, heads=3, kv_heads=1, size=8)
    tree = attention.tree_of(40, 8, 2)
    inputs = attention.random_inputs(tree, args)
    calls = attention.unshared_calls([attention.rows_of(tree, x) for x in inputs], args)
    attempts = module("measure").Attempts()
    calls |= attention.shared_calls(tree, inputs, args, attempts, "a case")
    for name in ("unshared flash 3", "flash 3"):
        calls[name]()
    assert seen == [
        ("flash_attention_3", (2, 48, 3, 8), True),
        ("flash_attention_3", (1, 56, 3, 8), True),
    ]
    assert not attempts.errors
