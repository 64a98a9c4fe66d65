"""Speed-up of sharing one pair, over prompt and response lengths.

    python benchmarks/grid.py [--shape 1.5b] [--backends sdpa ...] [--frozen] [--out FOLDER]

Forward and backward of the decoder without LM head; the loss weighs every position, so gradients
flow everywhere. The two rows are equally long and nothing is padded: whatever is gained comes from
sharing the prompt. The speed-up is over the faster unshared run, the ideal is the ratio of FLOPs,
the error that of the shared hidden states against the unshared, over the largest of them.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from charts import heat_maps
from decoder import build_decoder, row_pairs, step_flops, tree_pairs
from measure import (
    Side,
    fits,
    parse,
    peak_memory,
    setting,
    shared_sides,
    time_in_turn,
    unshared_sides,
)
from report import write_table
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_prefix_patch import PrefixTree

# flash-pref 0.1.1 README, Qwen2.5-7B, A800, checkpointing, one pair; over unshared FA2.
PUBLISHED_RESPONSES = (64, 256, 512, 1024, 2048)
PUBLISHED = {
    512: (1.43, 1.31, 1.22, 1.17, 1.11),
    1024: (1.53, 1.42, 1.38, 1.26, 1.15),
    2048: (1.73, 1.59, 1.51, 1.40, 1.27),
    4096: (1.75, 1.71, 1.63, 1.54, 1.40),
    8192: (1.82, 1.81, 1.74, 1.67, 1.55),
    16384: (1.88, 1.84, 1.83, 1.77, 1.69),
}
HEADER = (
    "prompt",
    "response",
    "backend",
    "unshared ms",
    "unshared flash ms",
    "shared ms",
    "speed-up",
    "ideal",
    "token bound",
    "share of ideal",
    "unshared GiB",
    "shared GiB",
    "error",
    "flash-pref",
)
UNSHARED = ("unshared", "unshared flash")
OUT_OF_MEMORY = "OOM"
DEFAULTS = {
    "cpu": {
        "prompts": [128, 256, 512, 1024],
        "responses": [32, 64, 128, 256],
        "backends": ["sdpa"],
        "repeats": 3,
        "checkpointing": False,
    },
    "cuda": {
        "prompts": list(PUBLISHED),
        "responses": list(PUBLISHED_RESPONSES),
        "backends": ["torch_varlen", "flash", "flex", "sdpa"],
        "repeats": 5,
        "checkpointing": True,
    },
}


def main(argv: list[str] | None = None) -> None:
    args = parse(options(), argv, DEFAULTS)
    model = build_decoder(
        args.shape, args.device, args.dtype, checkpointing=args.checkpointing, frozen=args.frozen
    )
    plain, shared = unshared_sides(args.device), shared_sides(model, args.backends)
    warm_up(model, [*plain, *shared])
    table = []
    names = [[side.name for side in sides] for sides in (plain, shared)]
    sizes = [(prompt, response) for prompt in args.prompts for response in args.responses]
    for size in tqdm(sizes, desc="prompt x response"):
        rows = random_pair(*size, model)
        cell = measure(model, plain, shared, rows, args.repeats)
        table += cell_lines(cell, size, *names, ideal_ratio(model, rows[0], args))
    title = f"One pair, {args.shape} decoder on {args.device}"
    title += ", weights frozen" if args.frozen else ""
    note = f"{setting(args)}, median of {args.repeats}; flash-pref: flash-pref 0.1.1 README, "
    note += "Qwen2.5-7B, A800, checkpointing, one pair"
    write_table(title, HEADER, table, args.out, note, lambda figure: draw(figure, table))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--prompts", type=int, nargs="+", help="tokens")
    add("--responses", type=int, nargs="+", help="tokens")
    add("--backends", nargs="+", help="of sharing; those that cannot serve are left out")
    add("--repeats", type=int)
    return parser


def warm_up(model: PreTrainedModel, sides: list[Side]) -> None:
    """Let libraries allocate their workspaces before any peak is read."""
    ids, direction = random_pair(64, 64, model)
    for side in sides:
        with side.on(model):
            step(model, ids, direction)


def random_pair(prompt: int, response: int, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """`[2, P + R]` rows that part right after the prompt, and the loss's direction `[H]`."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, prompt + response), generator=generator)
    ids[1, :prompt] = ids[0, :prompt]
    ids[1, prompt] = (ids[0, prompt] + 1) % config.vocab_size
    direction = torch.randn(config.hidden_size, generator=generator)
    return ids.to(model.device), direction.to(model.device, model.dtype)


def step(model: PreTrainedModel, ids: Tensor, direction: Tensor) -> None:
    hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden @ direction).float().sum().backward()


def probe(
    model: PreTrainedModel, side: Side, ids: Tensor, direction: Tensor
) -> tuple[Tensor | None, int | None]:
    """Hidden states `[2, L, H]` and peak memory of a step; None for what does not fit.

    Raises:
        RuntimeError: a backend ran without sharing.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).last_hidden_state

    with side.on(model) as sharing:
        hidden = fits(forward)
        if sharing is not None and sharing.stats.calls == 0:
            raise RuntimeError(f"{side.name} shared nothing: {dict(sharing.stats.bypassed)}")
        return hidden, fits(lambda: peak_memory(model, lambda: step(model, ids, direction)))


class Cell(NamedTuple):
    """What the sides took at one prompt and response length; no entry where memory ran out."""

    seconds: dict[str, float]
    peaks: dict[str, int]
    errors: dict[str, float]


def measure(
    model: PreTrainedModel,
    plain: list[Side],
    shared: list[Side],
    rows: tuple[Tensor, Tensor],
    repeats: int,
) -> Cell:
    cell = Cell({}, {}, {})
    reference, steps = None, {}
    for side in (*plain, *shared):
        hidden, peak = probe(model, side, *rows)
        if hidden is not None and reference is None and side in plain:
            reference = hidden
        if hidden is not None and reference is not None:
            error = (hidden - reference).abs().max() / reference.abs().max()
            cell.errors[side.name] = error.item()
        if peak is not None:
            cell.peaks[side.name] = peak
            steps[side.name] = side, partial(step, model, *rows)
    cell.seconds.update(fits(lambda: time_in_turn(model, steps, repeats)) or {})
    return cell


def cell_lines(
    cell: Cell, size: tuple[int, int], plain: list[str], backends: list[str], ideal: float
) -> Iterator[tuple]:
    """A line of the table for each backend."""
    prompt, response = size
    best = min(plain, key=lambda name: cell.seconds.get(name, inf))
    bound = 2 * (prompt + response) / (prompt + 2 * response)
    published = dict(zip(PUBLISHED_RESPONSES, PUBLISHED.get(prompt, ()), strict=False))
    for name in backends:
        gain = None
        if best in cell.seconds and name in cell.seconds:
            gain = cell.seconds[best] / cell.seconds[name]
        yield (
            prompt,
            response,
            name,
            *(entry(cell.seconds.get(x), 1e3) if x in plain else "-" for x in UNSHARED),
            entry(cell.seconds.get(name), 1e3),
            entry(gain),
            ideal,
            bound,
            entry(gain, 1 / ideal),
            *(entry(cell.peaks.get(x), 2**-30) for x in (best, name)),
            entry(cell.errors.get(name)),
            published.get(response, "-"),
        )


def ideal_ratio(model: PreTrainedModel, ids: Tensor, args: argparse.Namespace) -> float:
    """FLOPs of the step unshared over FLOPs of it shared."""
    options = {"checkpointing": args.checkpointing, "frozen": args.frozen}
    tree, lengths = PrefixTree.from_rows(ids), [ids.shape[1]] * len(ids)
    before = step_flops(model.config, sum(lengths), row_pairs(lengths), **options)
    return before / step_flops(model.config, tree.packed_tokens, tree_pairs(tree), **options)


def entry(value: float | None, factor: float = 1.0) -> float | str:
    return OUT_OF_MEMORY if value is None else value * factor


def draw(figure: Any, table: list[tuple]) -> None:
    """A heat map for each backend."""
    maps: dict[str, dict] = {}
    for row in table:
        values = dict(zip(HEADER, row, strict=True))
        gain = None if values["speed-up"] == OUT_OF_MEMORY else values["speed-up"]
        cells = maps.setdefault(values["backend"], {})
        cells[values["prompt"], values["response"]] = gain, values["ideal"]
    heat_maps(figure, maps, "response tokens", "prompt tokens")


if __name__ == "__main__":
    main()
