"""Counters that say what sharing did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock

from hf_prefix_patch.tree import PrefixTree

# Of the module, as stats are copied and pickled with their model.
_lock = Lock()


@dataclass
class SharingStats:
    """What the shared calls of one or more decoder stacks added up to.

    Attributes:
        row_tokens: real tokens in the rows of all shared calls.
        padded_tokens: cells in those rows, what the decoder would have run on.
        packed_tokens: tokens that the decoder ran on.
        calls: shared calls, those included that raised.
        bypassed: calls that ran as they were, by reason.
    """

    row_tokens: int = 0
    padded_tokens: int = 0
    packed_tokens: int = 0
    calls: int = 0
    bypassed: Counter[str] = field(default_factory=Counter)

    @property
    def sharing_ratio(self) -> float:
        """Real tokens in rows per packed token; 1.0 while nothing was shared."""
        return self.row_tokens / self.packed_tokens if self.packed_tokens else 1.0

    @property
    def padded_ratio(self) -> float:
        """Cells in rows, padding included, per packed token: what both save together."""
        return self.padded_tokens / self.packed_tokens if self.packed_tokens else 1.0

    def __str__(self) -> str:
        """In words: tokens, ratios, calls, and what was bypassed."""
        reasons = "; ".join(f"{reason} ({n})" for reason, n in self.bypassed.items())
        if not self.calls:
            return f"no call shared; bypassed: {reasons or 'none'}"
        return (
            f"{self.packed_tokens:,} tokens computed in place of {self.padded_tokens:,} "
            f"({self.padded_ratio:.2f}x, of which sharing {self.sharing_ratio:.2f}x, the rest "
            f"padding), {self.calls:,} calls; bypassed: {reasons or 'none'}"
        )

    def add(self, tree: PrefixTree) -> None:
        """Count a shared call; it counts from its start, whatever happens in it."""
        with _lock:
            counts = (
                self.row_tokens + tree.row_tokens,
                self.padded_tokens + tree.padded_tokens,
                self.packed_tokens + tree.packed_tokens,
                self.calls + 1,
            )
            # At once: Ctrl-C may come between any two lines.
            self.row_tokens, self.padded_tokens, self.packed_tokens, self.calls = counts

    def add_bypassed(self, reason: str) -> None:
        """Count a call that runs as it is."""
        with _lock:
            self.bypassed[reason] += 1

    def __add__(self, other: SharingStats) -> SharingStats:
        return SharingStats(
            self.row_tokens + other.row_tokens,
            self.padded_tokens + other.padded_tokens,
            self.packed_tokens + other.packed_tokens,
            self.calls + other.calls,
            self.bypassed + other.bypassed,
        )
