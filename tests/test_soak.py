"""Memory over many steps: nothing grows, and growth would be seen."""

import importlib
from pathlib import Path

import pytest
import torch

from hf_prefix_patch import plans
from hf_prefix_patch.hooks import BackbonePatch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return importlib.import_module("soak")


def test_nothing_grows(soak, tmp_path):
    soak.main(["--steps", "120", "--every", "10", "--out", str(tmp_path)])
    (written,) = tmp_path.glob("*.csv")
    assert written.stem == "memory-over-120-steps"
    assert len(written.read_text().splitlines()) == 1 + 13
    assert (tmp_path / "memory-over-120-steps.png").stat().st_size > 5_000


def keep_rows(kept, monkeypatch):
    recall = plans.recall_plan
    monkeypatch.setattr(
        "hf_prefix_patch.hooks.recall_plan",
        lambda rows: kept.append([x if x is None else x.clone() for x in rows]) or recall(rows),
    )


def keep_selections(kept, monkeypatch):
    """As if each call had needs of its own."""
    select = BackbonePatch.selection
    monkeypatch.setattr(
        BackbonePatch,
        "selection",
        lambda patch, *args: (
            patch._selections.setdefault(len(patch._selections), None) or select(patch, *args)
        ),
    )


def keep_objects(kept, monkeypatch):
    add = BackbonePatch.watch
    monkeypatch.setattr(
        BackbonePatch, "watch", lambda patch, *call: kept.append([len(kept)]) or add(patch, *call)
    )


@pytest.mark.parametrize(
    ("leak", "shows"),
    [
        (keep_rows, "tensors from .* MiB in tensors from"),
        (keep_selections, "cache entries from"),
        (keep_objects, "objects from"),
    ],
)
def test_a_leak_would_show(soak, monkeypatch, leak, shows):
    leak([], monkeypatch)
    with pytest.raises(SystemExit, match=f"memory grows: .*{shows}"):
        soak.main(["--steps", "36", "--every", "4"])
