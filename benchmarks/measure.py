"""What the benchmarks of a decoder share: options, sides, time in turn, peak memory."""

import argparse
import ctypes
import gc
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoder import SHAPES
from report import machine, results_folder, save_table, write_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, utils

from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.backends.base import HALF
from hf_prefix_patch.measuring import peak_of, seconds_of

OUT_OF_MEMORY, FAILED = "OOM", "failed"
_LONGEST_NOTE = 200  # characters of an error's first line
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h

DEFAULTS = {
    "cpu": {"dtype": "float32", "shape": "small", "frozen": False},
    "cuda": {"dtype": "bfloat16", "shape": "1.5b", "frozen": False},
}


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, defaults: dict[str, dict[str, Any]]
) -> argparse.Namespace:
    """`parse_call` with the options of a decoder as well.

    Gradient checkpointing is an option of those benchmarks that have a default for it.
    """
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="size of the decoder")
    frozen = "no gradients of weights, as under LoRA"
    add("--frozen", action=argparse.BooleanOptionalAction, help=frozen)
    if "checkpointing" in defaults["cpu"]:
        add("--checkpointing", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    both = {device: DEFAULTS[device] | defaults[device] for device in defaults}
    return parse_call(parser, argv, both)


def parse_call(
    parser: argparse.ArgumentParser, argv: list[str] | None, defaults: dict[str, dict[str, Any]]
) -> argparse.Namespace:
    """Add the common options, parse, and fill in what was not given by the device's defaults; then
    the dtype itself, and the threads of the CPU."""
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on CUDA, or float32")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--out", type=results_folder, help="folder for table and chart")
    args = parser.parse_args(argv)
    for name, value in defaults[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    return args


def keep_freed_memory() -> None:
    """From here on glibc gives what is freed back to the next tensor, not to the system.

    Otherwise each large tensor is mapped anew, and the time that a large batch takes on a CPU is in
    part that of the system zeroing pages. Without glibc nothing changes.
    """
    with suppress(AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


def setting(args: argparse.Namespace) -> str:
    """The line of a table that says what it was measured on."""
    parts = [machine(args.device)]
    if args.device == "cpu":
        parts.append(f"{args.threads} thread{'s' if args.threads > 1 else ''}")
    sizes = SHAPES[args.shape][1]
    layers, hidden = sizes["num_hidden_layers"], sizes["hidden_size"]
    parts.append(f"{args.shape} decoder of {layers} layers, hidden size {hidden}")
    parts.append(str(args.dtype).removeprefix("torch."))
    parts.append("weights frozen" if args.frozen else "weights trained")
    if "checkpointing" in args:
        parts.append(f"checkpointing {'on' if args.checkpointing else 'off'}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Side:
    """One way to run a model: unpatched, or shared by a backend; `kernel` is the only one that
    PyTorch's attention may take."""

    name: str
    backend: str | None = None
    attention: str = "sdpa"
    kernel: SDPBackend | None = None

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[Any]:
        """The model run this way; yields the handle of sharing, or None."""
        if model.config._attn_implementation != self.attention:
            model.set_attn_implementation(self.attention)
        sharing = nullcontext() if self.backend is None else self._enable(model)
        kernel = nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)
        with sharing as handle, kernel:
            yield handle

    def _enable(self, model: PreTrainedModel) -> Any:
        # Modes that share nothing on purpose, and cells with little to share, need no warning.
        return enable_prefix_sharing(model, backend=self.backend, verify=False, on_bypass="ignore")


def unshared_sides(device: str, dtype: torch.dtype) -> list[Side]:
    """The unpatched model, with each attention that trainers use where it is installed.

    In half precision on CUDA also with PyTorch's own FlashAttention-2: it may prefer cuDNN's, which
    is faster on some devices.
    """
    sides = [Side("unshared")]
    if device == "cuda" and dtype in HALF:
        sides.append(Side("unshared torch flash", kernel=SDPBackend.FLASH_ATTENTION))
    flash = flash_implementations(device)
    return sides + [Side(f"unshared {flash_name(name)}", attention=name) for name in flash]


def flash_implementations(device: str) -> list[str]:
    """Those that transformers knows and finds the packages of; none but on CUDA."""
    if device != "cuda":
        return []
    available = {
        f"flash_attention_{x}": getattr(utils, f"is_flash_attn_{x}_available", None)
        for x in (2, 3, 4)
    }
    return [name for name, check in available.items() if check is not None and check()]


def flash_name(implementation: str) -> str:
    """`"flash 2"` of `"flash_attention_2"`: one name of the backend for each implementation."""
    return implementation.replace("_attention_", " ")


def shared_sides(model: PreTrainedModel, backends: list[str]) -> list[Side]:
    """Those of the backends that serve the model; a line for each that does not."""
    # The backend "flash" calls what transformers resolves for the model's own attention.
    flash = flash_implementations(model.device.type)
    asked = []
    for name in backends:
        if name == "flash" and flash:
            asked += [Side(flash_name(x), name, x) for x in flash]
        else:
            asked.append(Side(name, name))
    sides = []
    for side in asked:
        try:
            with side.on(model):
                sides.append(side)
        except (NotImplementedError, ValueError, RuntimeError, ImportError) as error:
            print(f"backend {side.name} left out: {error}")
    return sides


def fits(call: Callable[[], Any]) -> Any:
    """What `call` returns, or None if the device has too little memory for it."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass  # the traceback holds tensors as long as the exception lives
    free_memory()
    return None


def free_memory() -> None:
    gc.collect()
    with suppress(RuntimeError):  # of a device that an error has left unusable
        torch.cuda.empty_cache()


class Attempts:
    """Parts of a long run, each of which may fail without the others.

    Memory that runs out is a result. Any other error goes into the notes of the table and into the
    exit status.

    Attributes:
        errors: first line of the error of each part that failed.
    """

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}

    def __call__(self, part: str, call: Callable[[], Any]) -> Any:
        """What `call` returns; None if memory ran out or it failed."""
        try:
            return fits(call)
        except Exception as error:  # whatever a kernel or its compiler raises
            line = f"{type(error).__name__}: {error}".split("\n")[0]
            self.errors[part] = line[:_LONGEST_NOTE]
            traceback.print_exc()
        free_memory()
        return None

    def word(self, part: str) -> str:
        """What stands in the table for a part that returned nothing."""
        return FAILED if part in self.errors else OUT_OF_MEMORY

    def note(self) -> str:
        """The end of a table's setting."""
        return "".join(f"; {part} failed: {error}" for part, error in self.errors.items())

    def finish(self) -> None:
        """Exit with status 1 if a part failed other than for want of memory."""
        if self.errors:
            sys.exit(f"failed: {', '.join(self.errors)}")


class GrowingTable:
    """The table of a long run, saved after every line.

    Attributes:
        attempts: at its parts; those that fail are named beside the setting.
        lines: so far.
    """

    def __init__(self, title: str, header: tuple[str, ...], out: Path | None, setting: str) -> None:
        self.attempts = Attempts()
        self.lines: list[tuple] = []
        self._title, self._header, self._out, self._setting = title, header, out, setting

    def add(self, lines: Iterable[tuple]) -> None:
        self.lines += lines
        save_table(*self._arguments())

    def finish(self, draw: Callable[[Any], None] | None = None) -> None:
        """Print it, and draw its chart; then as `Attempts.finish`."""
        write_table(*self._arguments(), draw)
        self.attempts.finish()

    def _arguments(self) -> tuple[Any, ...]:
        setting = self._setting + self.attempts.note()
        return self._title, self._header, self.lines, self._out, setting


def entry(value: float | None, factor: float = 1.0, missing: str = OUT_OF_MEMORY) -> float | str:
    """A cell of a table: the value in other units, or why there is none."""
    return missing if value is None else value * factor


def time_in_turn(
    model: PreTrainedModel, steps: Mapping[str, tuple[Side, Callable[[], Any]]], repeats: int
) -> dict[str, float]:
    """Median seconds of each step.

    The steps take turns, so that a slow spell of the machine meets all of them. Switching from one
    side to another is not timed; planning, which belongs to every call, is.
    """

    def timed(side: Side, step: Callable[[], Any]) -> float:
        model.zero_grad(set_to_none=True)
        with side.on(model):
            return seconds_of(step, model.device)

    return medians({name: partial(timed, *step) for name, step in steps.items()}, repeats)


def medians(timers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of what each timer returns, called in turn."""
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, timer in timers.items():
            taken[name].append(timer())
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_memory(model: PreTrainedModel, step: Callable[[], Any]) -> int:
    """Most bytes that one training step held at once, weights and their gradients apart."""
    for weight in model.parameters():
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    return peak_of(step, model.device)
