"""The benchmark of predictions, on a tiny model: every mode runs on the tokens that are counted."""

import csv
import json
from pathlib import Path

import pytest
from tiny_trl import preference_pairs, save_tiny_model


@pytest.fixture
def predictions(module):
    return module("predictions")


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Options that stand for tiny data and models."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "tiny")
    Path("talk.jsonl").write_text("\n".join(map(json.dumps, preference_pairs(12))))
    options = ["--data", "talk.jsonl", "--model", "tiny", "--shape", "tiny", "--vocab", "512"]
    sizes = ["--pairs", "3", "--decoder-pairs", "2", "--batches", "2", "--repeats", "1"]
    return [*options, *sizes, "--device", "cpu", "--threads", "1", "--out", "out"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's options have new names
def test_predictions(predictions, given):
    predictions.main(given)
    (path,) = Path("out").glob("*.csv")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["tiny"] * 8
    assert [line["what"] for line in lines] == list(predictions.GAINS) * 2
    for line in lines:
        predicted, measured, tokens = (
            float(line[x]) for x in ("predicted", "measured", "token ratio")
        )
        assert float(line["predicted / measured"]) == pytest.approx(predicted / measured)
        assert float(line["slower s"]) / float(line["faster s"]) == pytest.approx(measured)
        assert 1 < predicted < 1.5 * tokens
    for first in (0, 4):
        padding, _, across, both = (float(line["predicted"]) for line in lines[first : first + 4])
        assert both == pytest.approx(padding * across)


def test_other_tokens_than_are_counted_are_an_error(predictions):
    pairs = predictions.Pairs.of([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}])
    predictions.check_tokens("across", 4, pairs, [0])
    with pytest.raises(RuntimeError, match="across: the decoder ran on 5 tokens, not on 4"):
        predictions.check_tokens("across", 5, pairs, [0])
