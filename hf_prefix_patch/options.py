"""Checks of options that several entries share; the standard library only."""

from __future__ import annotations

import argparse
import json
from numbers import Integral
from typing import Any


def check_counts(**given: Any) -> None:
    """Refuse what is neither None nor an integer of at least 1.

    Raises:
        TypeError: no integer; True and False are none.
        ValueError: below 1.
    """
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(
                f"{name} is {value!r}, but must be an integer; leave it out to do without"
            )
        if int(value) < 1:
            raise ValueError(
                f"{name} is {value}, but must be at least 1; leave it out to do without"
            )


def check_switches(**given: Any) -> None:
    """Refuse what is neither True nor False: a string such as "no" would count as True.

    Raises:
        TypeError: anything else.
    """
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, but must be True or False; pass one of these")


def name(text: str) -> str:
    """An option of the command line that is a path or a name."""
    if not text:
        raise argparse.ArgumentTypeError(
            "an empty string is given, but must be a path or a name; set the variable that it "
            "comes from, or leave it out to do without"
        )
    return text


def seed(text: str) -> int:
    """An option of the command line that numpy, torch and Python take as a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"{text!r} is given, but must be an integer from 0 to 2**32 - 1; give one of these"
        )
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """An option of the command line that is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"""{text!r} is given, but must be a JSON object; write it as '{{"name": value}}'"""
        )
    return value


def count(text: str) -> int:
    """An option of the command line that is an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is given, but must be an integer of at least 1; leave it out for the default"
        )
    return value
