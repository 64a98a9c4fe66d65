"""The benchmark of log-probs counts right, runs from end to end, and writes what it says."""

import csv
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

WAYS = ["all logits", "completion logits", "linear_logps"]
SMALL = ["--device", "cpu", "--threads", "1", "--vocab", "3000", "--hidden", "8", "--repeats", "1"]


@pytest.fixture
def logps(module):
    return module("logps")


def small_batch(logps):
    args = Namespace(prompt_tokens=20, vocab=300, device="cpu", dtype=torch.float32)
    return logps.random_batch(8, 5, args)


def read(folder):
    (written,) = folder.glob("*.csv")
    with written.open(newline="") as file:
        return written, list(csv.DictReader(file))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_step_flops(logps, way, trained):
    """Against torch's count of what a step computes."""
    batch = small_batch(logps)
    with FlopCounterMode(display=False) as counter:
        logps.step(way, batch, trained)
    assert logps.step_flops(way, batch, trained) == counter.get_total_flops()


def test_errors_are_those_against_fp64(logps):
    """Of the completion tokens: in fp64 there is none, in bf16 that of its rounding."""
    batch = small_batch(logps)
    exact = logps.Batch(
        *(x.double() if x is batch.hidden or x is batch.weight else x for x in batch)
    )
    truth = logps.run_in_fp64(batch)
    assert [x.shape for x in truth] == [(5,), (5, 8)]
    found = logps.step("all logits", exact, trained=False)
    assert max(logps.errors_of(found, truth, batch.prompt)) < 1e-14
    moved = found[0] + 0.25, found[1] * 1.5
    assert logps.errors_of(moved, truth, batch.prompt) == pytest.approx((0.25, 0.5))


def test_every_way_on_every_size(logps, tmp_path):
    sizes = ["--tokens", "16", "64", "--prompt-tokens", "192"]
    logps.main([*SMALL, *sizes, "--out", str(tmp_path)])
    written, rows = read(tmp_path)
    assert written.stem == "log-probs-against-full-logits-on-cpu-1-threads"
    text = written.with_suffix(".md").read_text()
    assert "vocabulary of 3000" in text
    assert "torch 2." in text
    assert written.with_suffix(".png").stat().st_size > 5_000
    assert [(row["completion tokens"], row["head"], row["way"]) for row in rows] == [
        (tokens, head, way)
        for tokens in ("16", "64")
        for head in ("frozen", "trained")
        for way in WAYS
    ]
    for row in rows:
        assert float(row["error"]) < 1e-5
        assert float(row["gradient error"]) < 1e-5
        gain, ideal = float(row["speed-up"]), float(row["ideal"])
        assert gain > 0
        assert float(row["share of ideal"]) == pytest.approx(gain / ideal)
    for head, again in (("frozen", 1), ("trained", 4 / 3)):
        whole, part, ours = (row for row in rows[:6] if row["head"] == head)
        assert float(part["ideal"]) == (192 + 16) / 16
        assert float(ours["ideal"]) == pytest.approx((192 + 16) / 16 / again)
        peaks = [float(row["peak MiB"]) for row in (whole, part, ours)]
        ratios = [float(row["memory ratio"]) for row in (whole, part, ours)]
        assert ratios == pytest.approx([peaks[0] / peak for peak in peaks])
        assert peaks[0] > peaks[1]


@pytest.mark.parametrize(
    ("error", "word"), [(torch.OutOfMemoryError(), "OOM"), (ValueError("no such kernel"), "failed")]
)
def test_what_does_not_run_is_reported(logps, monkeypatch, tmp_path, error, word):
    """The other ways are measured; only want of memory is no failure."""

    def fail(*inputs):
        raise error

    monkeypatch.setitem(logps.WAYS, "all logits", fail)
    sizes = ["--tokens", "16", "--prompt-tokens", "64"]
    with pytest.raises(SystemExit, match="all logits") if word == "failed" else nullcontext():
        logps.main([*SMALL, *sizes, "--out", str(tmp_path)])
    written, rows = read(tmp_path)
    names = ("seconds", "speed-up", "share of ideal", "peak MiB", "memory ratio")
    for failed in (rows[0], rows[3]):
        assert [failed[name] for name in (*names, "error")] == [word] * 6
    for row in (rows[1], rows[2]):
        assert float(row["seconds"]) > 0
        assert float(row["peak MiB"]) > 0
        assert [row["speed-up"], row["memory ratio"]] == [word] * 2
    assert ("failed: ValueError: no such kernel" in written.with_suffix(".md").read_text()) == (
        word == "failed"
    )
    assert written.with_suffix(".png").stat().st_size > 5_000
