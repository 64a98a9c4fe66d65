"""Tables of the benchmarks: to the screen, and as CSV and markdown with hardware and versions."""

import csv
import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path


def machine() -> str:
    """Processor and cores, and the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {os.cpu_count()} cores"


def versions(*packages: str) -> str:
    found = [(name, importlib.metadata.version(name)) for name in packages]
    return ", ".join(f"{name} {version}" for name, version in found)


def write_table(
    title: str, header: tuple[str, ...], rows: list[tuple], out: Path | None, setting: str
) -> None:
    """Print the table; with `out`, also write `<title>.csv` and `<title>.md` there."""
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in (header, ["--:"] * len(header), *cells)]
    used = versions("torch", "transformers", "trl", "peft")
    note = f"{setting}; {used}; {datetime.now(UTC):%Y-%m-%d}"
    text = "\n".join([f"# {title}", "", note, "", *lines, ""])
    print(text)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    stem = "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
    (out / f"{stem}.md").write_text(text)
    with (out / f"{stem}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
