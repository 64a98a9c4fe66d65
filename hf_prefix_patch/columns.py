"""The columns of tokenised examples, and the rows that they stand for.

Knows the names that TRL's data sets have used, and nothing of models or batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

TruncationMode = Literal["keep_start", "keep_end"]

REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns of precomputed reference log-probs."""

# Columns of a prompt, and of the completions that each make a row with it.
_LAYOUTS: list[tuple[str, tuple[str, ...]]] = [
    (f"prompt{suffix}", tuple(f"{name}{suffix}" for name in names))
    for names in (("chosen", "rejected"), ("completion",))
    for suffix in ("_ids", "_input_ids")
]
_LAYOUTS.append(("", ("input_ids",)))


class Row(NamedTuple):
    """One row of an example.

    Attributes:
        ids: `[L]` int64, prompt and completion.
        prompt_length: tokens of `ids` that belong to the prompt.
    """

    ids: np.ndarray
    prompt_length: int


def rows_of(
    example: Mapping[str, Any],
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
) -> list[Row]:
    """Rows of a tokenised example, cut to `max_length` tokens each.

    Args:
        example: `prompt_ids`, `chosen_ids` and `rejected_ids` (two rows), the last two without a
            prompt (two rows that are completion throughout), `prompt_ids` and `completion_ids` (one
            row) or `input_ids` (one). Names that end in `_input_ids` mean the same; there, a
            completion may begin with its prompt (ORPO and CPO of TRL).
        max_length: longest row; None for any length.
        truncation_mode: the end of a row that stays.

    Raises:
        KeyError: none of these columns is there.
    """
    prompt_name, names = _layout(example)
    start = _as_ids(example.get(prompt_name, ()))
    rows = []
    for name in names:
        ids = _as_ids(example[name])
        whole = name.endswith("_input_ids") and np.array_equal(ids[: len(start)], start)
        ids = ids if whole else np.concatenate([start, ids])
        cut = 0 if max_length is None else max(0, len(ids) - max_length)
        if truncation_mode == "keep_start":
            rows.append(Row(ids[: len(ids) - cut], min(len(start), len(ids) - cut)))
        else:
            rows.append(Row(ids[cut:], max(0, len(start) - cut)))
    return rows


def check_truncation_mode(mode: str) -> None:
    """Raise a ValueError for an unknown mode."""
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode is {mode!r}, but must be 'keep_start' or 'keep_end'")


def _layout(example: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The column of the prompt, and those whose tokens end a row, one for each row."""
    for layout in _LAYOUTS:
        if layout[1][0] in example and layout[1][-1] in example:
            return layout
    raise KeyError(
        f"an example has the columns {sorted(example)}, but needs chosen_ids and rejected_ids (and "
        "prompt_ids), or completion_ids, or input_ids; tokenise the data first, for example with "
        "hf_prefix_patch.tokenize_preferences"
    )


def _as_ids(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.int64)
