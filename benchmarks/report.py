"""Tables of the benchmarks: to the screen, and as CSV, markdown and chart with the hardware."""

import argparse
import csv
import importlib.metadata
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine(device: str | None = None) -> str:
    """The GPU if there is one and `device` is not the CPU, else processor and cores."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties().total_memory / 2**30
        name, cudnn = torch.cuda.get_device_name(), torch.backends.cudnn.version()
        return f"{name}, {memory:.0f} GiB, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {os.cpu_count()} cores"


def versions(*packages: str) -> str:
    """Names and versions of those of the packages that are installed."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def results_folder(path: str) -> Path:
    """An argument that names a folder for tables and charts, made when the first is written.

    Raises:
        argparse.ArgumentTypeError: it is a file, or below one.
    """
    folder = Path(path)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise argparse.ArgumentTypeError(f"{place} is a file, and results need a folder")
    return folder


def write_table(
    title: str,
    header: tuple[str, ...],
    rows: list[tuple],
    out: Path | None,
    setting: str,
    draw: Callable[[Any], None] | None = None,
) -> None:
    """Print the table and save it; with `out` and `draw`, which fills a figure, its chart too."""
    print(save_table(title, header, rows, out, setting))
    if out is not None and draw is not None:
        save_chart(draw, out / f"{stem_of(title)}.png")


def save_table(
    title: str, header: tuple[str, ...], rows: list[tuple], out: Path | None, setting: str
) -> str:
    """Its text; with `out`, also write `<title>.csv` and `<title>.md` there.

    A long run calls it after every line, so that what stops the run loses none of them.
    """
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in (header, ["--:"] * len(header), *cells)]
    used = versions("torch", "transformers", "trl", "peft", "flash-attn")
    note = f"{setting}; {used}; {datetime.now(UTC):%Y-%m-%d}"
    text = "\n".join([f"# {title}", "", note, "", *lines, ""])
    if out is None:
        return text
    out.mkdir(parents=True, exist_ok=True)
    stem = stem_of(title)
    (out / f"{stem}.md").write_text(text)
    with (out / f"{stem}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return text


def stem_of(title: str) -> str:
    """Of the names of its files."""
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def save_chart(draw: Callable[[Any], None], path: Path) -> None:
    """A chart that needs no display; without matplotlib, a line that says there is none."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"matplotlib is not installed: no {path.name}")
        return
    figure = Figure(layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path)
