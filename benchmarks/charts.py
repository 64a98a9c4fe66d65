"""Charts of the benchmarks: functions that fill a matplotlib figure."""

from collections.abc import Mapping, Sequence
from math import nan
from textwrap import fill
from typing import Any

Cells = Mapping[tuple[int, int], tuple[float | str, float]]


def heat_maps(figure: Any, panels: Mapping[str, Cells], x_label: str, y_label: str) -> None:
    """A map for each panel; a cell `(y, x)` shows the value measured and the ideal under it.

    A word in place of a value says why there is none.
    """
    ys, xs = (sorted({key[i] for cells in panels.values() for key in cells}) for i in (0, 1))
    width, height = 1.4 + 0.9 * len(xs) * len(panels), 1.4 + 0.6 * len(ys)
    figure.set_size_inches(max(4.5, width), max(3, height))
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, cells) in zip(row, panels.items(), strict=True):
        values = [[nan] * len(xs) for _ in ys]
        for (y, x), (value, ideal) in cells.items():
            i, j = ys.index(y), xs.index(x)
            measured = nan if isinstance(value, str) else value
            values[i][j] = measured
            text = value if isinstance(value, str) else f"{value:.2f}"
            colour = "white" if measured > 1.7 else "black"
            label = f"{text}\n({ideal:.2f})"
            axes.text(j, i, label, ha="center", va="center", fontsize=8, color=colour)
        image = axes.imshow(values, cmap="YlGn", vmin=0.9, vmax=2.1, aspect="auto")
        axes.set_xticks(range(len(xs)), xs)
        axes.set_yticks(range(len(ys)), ys)
        axes.set(title=f"{title}: speed-up (ideal)", xlabel=x_label)
    row[0].set_ylabel(y_label)
    figure.colorbar(image, ax=list(row), label="speed-up")


def grouped_bars(
    figure: Any,
    groups: Sequence[str],
    bars: Mapping[str, Sequence[tuple[float, float]]],
    y_label: str,
    unit: float | None = 1,
) -> None:
    """Groups of bars; every bar has a value and its ideal, which stands as a mark.

    A line marks `unit`: of ratios, where nothing is gained.
    """
    names_in_legend = 2.1 * (len(bars) + 1)
    figure.set_size_inches(max(8, 1.8 * len(groups), names_in_legend), 4)
    axes = figure.subplots()
    width = 0.8 / len(bars)
    for i, (name, pairs) in enumerate(bars.items()):
        places = [g + (i - (len(bars) - 1) / 2) * width for g in range(len(groups))]
        axes.bar(places, [value for value, _ in pairs], width, label=name)
        label = "ideal" if i == 0 else None
        ideals = [ideal for _, ideal in pairs]
        axes.scatter(places, ideals, marker="_", s=90, color="black", zorder=3, label=label)
    if unit is not None:
        axes.axhline(unit, color="grey", linewidth=0.8)
    names = [fill(name.replace("_", " "), 16) for name in groups]
    axes.set_xticks(range(len(groups)), names)
    axes.set_ylabel(y_label)
    figure.legend(loc="outside upper center", ncols=len(bars) + 1, frameon=False)


def line_panels(
    figure: Any, lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str
) -> None:
    """A panel from zero up for each line, one under the other."""
    figure.set_size_inches(7, 1.8 * len(lines))
    column = figure.subplots(len(lines), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, points) in zip(column, lines.items(), strict=True):
        axes.plot(*zip(*points, strict=True))
        most = max(y for _, y in points)
        axes.set(ylabel=name, xlim=(0, None), ylim=(0, 1.25 * most))
    column[-1].set_xlabel(x_label)


def lines_to_limit(
    figure: Any,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    limit: float,
    x_label: str,
    y_label: str,
) -> None:
    """Lines through measured points, and the limit that they are to stay under."""
    figure.set_size_inches(6, 4)
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=3, label=name)
    axes.axhline(limit, color="black", linestyle="--", linewidth=0.8, label="budget")
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
