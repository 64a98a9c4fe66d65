"""The demo's preference set is what its README says."""

import json
from pathlib import Path

PAIRS = Path(__file__).parents[1] / "examples" / "data" / "preferences.jsonl"


def test_preference_set():
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    assert len(rows) == 64
    several_turns = 0
    for row in rows:
        assert row.keys() == {"prompt", "chosen", "rejected"}
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        several_turns += len(roles) > 1
        for answer in ("chosen", "rejected"):
            assert [message["role"] for message in row[answer]] == ["assistant"]
        assert len(row["prompt"][0]["content"].split()) > 200
    answers = [row[key][0]["content"] for row in rows for key in ("chosen", "rejected")]
    assert len(set(answers)) == 2 * len(rows)
    assert several_turns == 24
