"""Draws how-it-works.svg of the plan of a small batch: `make picture`.

    python docs/picture.py

Everything in the picture is read off a `PrefixTree`: change `ROWS` and it shows that batch instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import torch

from hf_prefix_patch import PrefixTree

PICTURE = Path(__file__).with_name("how-it-works.svg")
ROWS = {
    "pair 1, chosen": "Be brief: Red fruit? Apple .",
    "pair 2, chosen": "Be brief: Tall animal? Giraffe",
    "pair 1, rejected": "Be brief: Red fruit? A ripe cherry",
    "pair 2, rejected": "Be brief: Tall animal? An elephant !",
}
PAD = "·"

WIDTH, MARGIN, LABELS = 1160, 36, 108
CELL, LINE = 60, 28  # a token
DOT = 19  # a score
_RIGHT = 640

# Hues for the segments in their order, on light and on dark ground.
_LIGHT = ["#cbd5e1", "#5eead4", "#a7f3d0", "#bae6fd", "#fdba74", "#fde68a", "#fecdd3"]
_DARK = ["#475569", "#0f766e", "#166534", "#075985", "#9a3412", "#854d0e", "#9f1239"]
_STYLE = """
svg { --ground: #ffffff; --edge: #e2e8f0; --ink: #0f172a; --faint: #64748b; --empty: #f1f5f9; %s }
@media (prefers-color-scheme: dark) {
svg { --ground: #0f172a; --edge: #334155; --ink: #f1f5f9; --faint: #94a3b8; --empty: #1e293b; %s }
}
text { fill: var(--ink); font: 12px system-ui, sans-serif; text-anchor: middle; }
.title { font-size: 15px; font-weight: 600; text-anchor: start; }
.note { fill: var(--faint); text-anchor: start; }
.number { font: 12px ui-monospace, monospace; text-anchor: start; }
.small { fill: var(--faint); font-size: 11px; }
.label { fill: var(--faint); text-anchor: end; }
.ground { fill: var(--ground); stroke: var(--edge); }
.pad { fill: none; stroke: var(--edge); }
.again { fill-opacity: 0.25; stroke-dasharray: 3 3; }
.line { fill: none; stroke: var(--faint); stroke-width: 1.5; }
.tip { fill: var(--faint); }
"""


class Drawing:
    """Shapes of an SVG picture, one a line."""

    def __init__(self) -> None:
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, round_: int) -> None:
        size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_}"'
        self.shapes.append(f'<rect {size} class="{kind}"/>')

    def token(self, x: float, y: float, word: str, kind: str) -> None:
        self.box(x + 1, y + 1, CELL - 2, LINE - 2, kind, 4)
        if word:
            self.text(x + CELL / 2, y + LINE / 2 + 4, word, "small" if "pad" in kind else "")

    def arrow(self, path: str) -> None:
        self.shapes.append(f'<path d="{path}" class="line" marker-end="url(#tip)"/>')

    def line(self, path: str) -> None:
        self.shapes.append(f'<path d="{path}" class="line"/>')

    def heading(self, x: float, y: float, title: str, note: str) -> None:
        self.text(x, y, title, "title")
        self.text(x, y + 19, note, "note")


class Batch:
    """The rows as words, and their plan."""

    def __init__(self, rows: dict[str, str]) -> None:
        self.names = list(rows)
        words = [row.split() for row in rows.values()]
        vocabulary = list(dict.fromkeys(word for row in words for word in row))
        self.length = max(map(len, words))
        self.words = [row + [PAD] * (self.length - len(row)) for row in words]
        ids = [[vocabulary.index(w) if w != PAD else 0 for w in row] for row in self.words]
        mask = [[int(word != PAD) for word in row] for row in self.words]
        self.tree = PrefixTree.from_rows(ids, mask)
        cells = [word for row in self.words for word in row]
        self.packed = [cells[cell] for cell in self.tree.source.tolist()]
        lengths = torch.tensor(self.tree.segment_lengths)
        self.segment = torch.arange(len(lengths)).repeat_interleave(lengths).tolist()
        self.places = dict(
            zip(self.tree.cell.tolist(), self.tree.packed_index.tolist(), strict=True)
        )

    def segments(self) -> Iterable[tuple[int, int, int]]:
        """Each with where it begins and ends in the packed row."""
        bounds = pairwise(self.tree.cu_seqlens_q.tolist())
        return ((segment, *ends) for segment, ends in enumerate(bounds))

    def path(self, segment: int) -> list[int]:
        """Packed positions of the keys that the segment sees."""
        start, end = self.tree.cu_seqlens_k[segment : segment + 2].tolist()
        return self.tree.kv_index[start:end].tolist()


def draw_rows(drawing: Drawing, batch: Batch, x: float, y: float, back: bool) -> None:
    """The grid `[R, L]`, tokens that are computed elsewhere in outline; `back`: hidden states."""
    kept = set(batch.tree.source.tolist())
    for i, (name, row) in enumerate(zip(batch.names, batch.words, strict=True)):
        top = y + i * LINE
        drawing.text(x + LABELS - 8, top + LINE / 2 + 4, name, "label")
        for j, word in enumerate(row):
            cell = i * batch.length + j
            left = x + LABELS + j * CELL
            if cell not in batch.places:
                drawing.token(left, top, "0" if back else PAD, "pad")
                continue
            hue = f"s{batch.segment[batch.places[cell]]}"
            again = "" if back or cell in kept else " again"
            drawing.token(left, top, word, hue + again)


def draw_trie(drawing: Drawing, batch: Batch, x: float, y: float) -> None:
    """Segments from left to right, leaves on lines of their own."""
    parents = batch.tree.parents
    children = {s: [c for c, p in enumerate(parents) if p == s] for s in range(len(parents))}
    lines: dict[int, float] = {}
    leaves = 0
    for segment in reversed(range(len(parents))):  # a parent stands amid its children
        below = [lines[child] for child in children[segment]]
        if not below:
            leaves += 1
        lines[segment] = sum(below) / len(below) if below else -leaves
    gap, lefts = 30, {}
    for segment, start, end in batch.segments():
        parent = parents[segment]
        left = lefts[parent][1] + gap if parent >= 0 else x
        lefts[segment] = (left, left + (end - start) * CELL)
        top = y + (lines[segment] + leaves) * (LINE + 6)
        for i, word in enumerate(batch.packed[start:end]):
            drawing.token(left + i * CELL, top, word, f"s{segment}")
        if parent >= 0:
            middle, above = top + LINE / 2, y + (lines[parent] + leaves) * (LINE + 6) + LINE / 2
            begin = lefts[parent][1]
            bend = begin + gap / 2
            drawing.line(
                f"M{begin:g} {above:g}C{bend:g} {above:g} {bend:g} {middle:g} {left:g} {middle:g}"
            )


def draw_packed(drawing: Drawing, batch: Batch, y: float) -> None:
    """The row `[1, N]` with the positions that its tokens keep."""
    x = (WIDTH - len(batch.packed) * CELL) / 2
    for i, (word, position) in enumerate(
        zip(batch.packed, batch.tree.position_ids[0].tolist(), strict=True)
    ):
        drawing.token(x + i * CELL, y, word, f"s{batch.segment[i]}")
        drawing.text(x + (i + 0.5) * CELL, y + LINE + 14, str(position), "small")


def draw_attention(drawing: Drawing, batch: Batch, x: float, y: float) -> None:
    """A line for each query, a mark for each key that it sees, in the hue of the key."""
    size = batch.tree.packed_tokens
    drawing.box(x, y, size * DOT, size * DOT, "empty", 3)
    for segment, start, end in batch.segments():
        path = batch.path(segment)
        for query in range(start, end):
            word = batch.packed[query]
            drawing.text(x - 6, y + query * DOT + DOT - 4, word, "small label")
            for key in path[: len(path) - (end - 1 - query)]:  # causal, aligned to the end
                place = (x + key * DOT + 1, y + query * DOT + 1)
                drawing.box(*place, DOT - 2, DOT - 2, f"s{batch.segment[key]}", 2)
    for segment, start, end in batch.segments():
        drawing.box(x + start * DOT, y - 8, (end - start) * DOT - 1, 5, f"s{segment}", 2)


def draw_paths(drawing: Drawing, batch: Batch, x: float, y: float) -> None:
    """A line for each segment: its tokens, and all on its path, as packed positions."""
    for segment, start, end in batch.segments():
        top = y + segment * 19
        drawing.box(x, top, 12, 12, f"s{segment}", 3)
        queries = " ".join(map(str, range(start, end)))
        keys = " ".join(map(str, batch.path(segment)))
        drawing.text(x + 22, top + 10, f"queries {queries}", "number")
        drawing.text(x + 170, top + 10, f"keys {keys}", "number")


def picture(rows: dict[str, str]) -> str:
    """The picture of a batch as SVG text, the same for the same rows."""
    batch, drawing = Batch(rows), Drawing()
    tree = batch.tree
    shape, size = f"[{tree.num_rows}, {tree.row_length}]", tree.packed_tokens
    top = MARGIN + 10
    drawing.heading(
        MARGIN,
        top,
        f"1  Rows {shape}, as the trainer passes them",
        f"{tree.padded_tokens} cells, {tree.row_tokens} of them tokens; dashed: computed elsewhere",
    )
    draw_rows(drawing, batch, MARGIN, top + 36, back=False)
    drawing.heading(
        _RIGHT,
        top,
        "2  The trie",
        "one token where all before it, and its position, are the same",
    )
    draw_trie(drawing, batch, _RIGHT, top + 36)
    middle = top + 36 + 2 * LINE
    drawing.arrow(f"M{_RIGHT - 66} {middle}H{_RIGHT - 24}")

    packed = middle + 2 * LINE + 60
    drawing.heading(
        MARGIN,
        packed,
        f"3  Packed [1, {size}], what the decoder runs on",
        f"{size} tokens instead of {tree.padded_tokens}; below, the positions that they keep",
    )
    draw_packed(drawing, batch, packed + 36)

    below = packed + 36 + LINE + 72
    drawing.heading(
        MARGIN,
        below,
        "4  Attention: every token sees its path, no other branch",
        "a line for each query; marked, in their own hue, the keys that it sees",
    )
    draw_attention(drawing, batch, MARGIN + LABELS, below + 44)
    drawing.heading(
        _RIGHT,
        below,
        "5  Segments and their paths",
        "all that attention is told: queries, and the keys from the root down to them",
    )
    draw_paths(drawing, batch, _RIGHT, below + 36)
    last = below + 36 + 19 * len(tree.parents) + 34
    drawing.heading(
        _RIGHT,
        last,
        f"6  Rows {shape}, as the LM head and the loss see them",
        "each hidden state copied to all cells of its token; zeros in the padding",
    )
    draw_rows(drawing, batch, _RIGHT - LABELS, last + 36, back=True)
    bottom = max(below + 44 + size * DOT, last + 36 + tree.num_rows * LINE)
    return _svg(drawing.shapes, bottom + MARGIN, tree)


def _svg(shapes: Sequence[str], height: float, tree: PrefixTree) -> str:
    hues = [" ".join(f"--s{i}: {hue};" for i, hue in enumerate(of)) for of in (_LIGHT, _DARK)]
    style = _STYLE % tuple(hues) + "".join(
        f".s{i} {{ fill: var(--s{i}); stroke: var(--s{i}); }}\n" for i in range(len(_LIGHT))
    )
    title = (
        f"{tree.num_rows} rows of {tree.row_length} cells become a packed row of "
        f"{tree.packed_tokens} tokens, in which each token sees its own path, and rows again"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" class="tip"/></marker>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
        f"<title>{title}</title>",
        f"<style>{style}.empty {{ fill: var(--empty); }}</style>",
        f"<defs>{tip}</defs>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2:g}" rx="12" class="ground"/>',
        *shapes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(ROWS))
    print(PICTURE)
