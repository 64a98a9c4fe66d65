"""The columns of tokenised examples, and the rows that they stand for.

Knows the names that TRL's data sets have used, and nothing of models or batches.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sized
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np

TruncationMode = Literal["keep_start", "keep_end"]

IMAGES = ("images", "image")
"""Columns of what a processor takes beside the text."""

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
    where: str = "an example",
) -> list[Row]:
    """Rows of a tokenised example, cut to `max_length` tokens each.

    Args:
        example: `prompt_ids`, `chosen_ids` and `rejected_ids` (two rows), the last two without a
            prompt (two rows that are completion throughout), `prompt_ids` and `completion_ids` (one
            row) or `input_ids` (one). Names that end in `_input_ids` mean the same; there, all
            completions may begin with their prompt (ORPO and CPO of TRL).
        max_length: longest row; None for any length.
        truncation_mode: the end of a row that stays.
        where: what messages call the example.

    Raises:
        TypeError: the example is no mapping, or a column holds something else than integers.
        ValueError: none of these columns is there, or one does not hold a list.
    """
    prompt_name, names = _layout(example, where)
    start = _as_ids(example.get(prompt_name, ()), prompt_name, where)
    ends = [_as_ids(example[name], name, where) for name in names]
    whole = names[0].endswith("_input_ids") and all(
        np.array_equal(ids[: len(start)], start) for ids in ends
    )
    rows = []
    for ids in ends if whole else [np.concatenate([start, ids]) for ids in ends]:
        cut = 0 if max_length is None else max(0, len(ids) - max_length)
        if truncation_mode == "keep_start":
            rows.append(Row(ids[: len(ids) - cut], min(len(start), len(ids) - cut)))
        else:
            rows.append(Row(ids[cut:], max(0, len(start) - cut)))
    return rows


def check_truncation_mode(mode: str) -> None:
    """Raise a ValueError for an unknown mode."""
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(
            f"truncation_mode is {mode!r}, but must be 'keep_start' or 'keep_end'; leave it out "
            "for the first"
        )


def _layout(example: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """The column of the prompt, and those whose tokens end a row, one for each row."""
    if not isinstance(example, Mapping):
        raise TypeError(
            f"{where} is a {type(example).__name__}, but must be a mapping with chosen_ids and "
            "rejected_ids (and prompt_ids); give a list of such examples"
        )
    for layout in _LAYOUTS:
        if layout[1][0] in example and layout[1][-1] in example:
            return layout
    raise ValueError(
        f"{where} has the columns {sorted(example)}, but needs chosen_ids and rejected_ids (and "
        "prompt_ids), or completion_ids, or input_ids; tokenise the data first, for example with "
        "hf_prefix_patch.tokenize_preferences"
    )


def _as_ids(x: Any, name: str, where: str) -> np.ndarray:
    """`[L]` int64."""
    if isinstance(x, list | tuple):
        # As fast as numpy's conversion to integers, which would round floats.
        with suppress(TypeError):
            return np.frombuffer(array("q", x), np.int64)
        nested = any(isinstance(value, Sized) and not isinstance(value, str) for value in x)
        ids = np.empty((0, 0) if nested else (len(x),))
    else:
        ids = np.asarray(x)
    if ids.ndim == 1 and (ids.dtype.kind in "iu" or not len(ids)):
        return ids.astype(np.int64, copy=False)
    if ids.ndim != 1:
        given = "None" if x is None else f"a {type(x).__name__}" + " of lists" * (ids.ndim > 1)
        raise ValueError(
            f"{name} of {where} is {given}, but must be one list of token ids; give the ids of one "
            "row, [] for none"
        )
    kinds = sorted({type(value).__name__ for value in x})
    raise TypeError(
        f"{name} of {where} holds values of type {kinds}, but must hold token ids, which are "
        "integers; tokenise the data first, for example with hf_prefix_patch.tokenize_preferences"
    )
