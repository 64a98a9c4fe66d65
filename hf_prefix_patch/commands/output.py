"""What commands print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def with_notes(message: object) -> str:
    """A message for the command line; of an error, with the notes that were added to it."""
    return f"{message}" + "".join(f" ({note})" for note in getattr(message, "__notes__", ()))


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around what is printed as a result: a reader that has seen enough, as `head -1` has, leaves
    the exit code what it is."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would raise once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
