"""Warnings of what happens in a model's forward, placed where the user's program called it."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_WITHIN = {"accelerate", "hf_prefix_patch", "peft", "torch", "transformers", "trl"}


def warn_caller(message: str) -> None:
    """A `UserWarning` at the nearest caller outside of what a model's call goes through. Python
    shows a warning once a place: each call of a program has its own."""
    level = 1  # this function's own frame
    frame: FrameType | None = sys._getframe()
    while frame is not None and _package(frame) in _WITHIN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
