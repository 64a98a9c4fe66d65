"""Warnings of what happens in a model's forward, placed where the user's program called it."""

from __future__ import annotations

import sys
import warnings

_WITHIN = {"accelerate", "hf_prefix_patch", "peft", "torch", "transformers"}


def warn_caller(message: str) -> None:
    """A `UserWarning` at the nearest caller outside of what a model's call goes through. Python
    shows a warning once a place: each call of a program has its own."""
    level = 2
    while (frame := _frame(level)) and frame.split(".")[0] in _WITHIN:
        level += 1
    warnings.warn(message, stacklevel=level)


def _frame(level: int) -> str | None:
    """Module of the caller so many levels above `warn_caller`'s own frame, which is 1."""
    try:
        return str(sys._getframe(level).f_globals.get("__name__"))
    except ValueError:  # no such frame
        return None
