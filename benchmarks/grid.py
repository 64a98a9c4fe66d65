"""Speed-up of sharing one pair, over prompt and response lengths.

    python benchmarks/grid.py [--shape 1.5b] [--backends sdpa ...] [--frozen] [--out FOLDER]

Forward and backward of the decoder without LM head; the loss weighs every position, so gradients
flow everywhere. The two rows are equally long and nothing is padded: whatever is gained comes from
sharing the prompt. The speed-up is over the fastest unshared run, the ideal is the ratio of FLOPs,
the error that of the shared hidden states against the unshared, over the largest of them. "Over
flash" is the speed-up over the fastest FlashAttention, as the published figures beside it are.
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
    Attempts,
    GrowingTable,
    Side,
    entry,
    fits,
    parse,
    peak_memory,
    setting,
    shared_sides,
    time_in_turn,
    unshared_sides,
)
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
    "over flash",
    "flash-pref",
)
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
    plain = unshared_sides(args.device, args.dtype)
    shared = shared_sides(model, args.backends)
    names = [[side.name for side in sides] for sides in (plain, shared)]
    sizes = [(prompt, response) for prompt in args.prompts for response in args.responses]
    title = f"One pair, {args.shape} decoder on {args.device}"
    title += ", weights frozen" if args.frozen else ""
    note = f"{setting(args)}, median of {args.repeats}; flash-pref: flash-pref 0.1.1 README, "
    note += "Qwen2.5-7B, A800, checkpointing, one pair; unshared attention: "
    note += ", ".join(side.name.removeprefix("unshared").strip() or "sdpa" for side in plain)
    table = GrowingTable(title, HEADER, args.out, note)
    for side in (*plain, *shared):
        table.attempts(f"{side.name}, warm-up", partial(warm_up, model, [side]))
    for size in tqdm(sizes, desc="prompt x response"):
        cell = measure(model, plain, shared, size, args.repeats, table.attempts)
        ideal = ideal_ratio(model, random_pair(*size, model)[0], args)
        table.add(cell_lines(cell, size, *names, ideal))
    table.finish(lambda figure: draw(figure, table.lines))


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
    """What the sides took at one prompt and response length.

    Where a side has no entry, `missing` says why.
    """

    seconds: dict[str, float]
    peaks: dict[str, int]
    errors: dict[str, float]
    missing: dict[str, str]


def measure(
    model: PreTrainedModel,
    plain: list[Side],
    shared: list[Side],
    size: tuple[int, int],
    repeats: int,
    attempts: Attempts,
) -> Cell:
    rows, where = random_pair(*size, model), "at {} + {} tokens".format(*size)
    cell = Cell({}, {}, {}, {})
    reference, steps = None, {}
    for side in (*plain, *shared):
        part = f"{side.name} {where}"
        hidden, peak = attempts(part, partial(probe, model, side, *rows)) or (None, None)
        cell.missing[side.name] = attempts.word(part)
        if hidden is not None and reference is None and side in plain:
            reference = hidden
        if hidden is not None and reference is not None:
            error = (hidden - reference).abs().max() / reference.abs().max()
            cell.errors[side.name] = error.item()
        if peak is not None:
            cell.peaks[side.name] = peak
            steps[side.name] = side, partial(step, model, *rows)
    part = f"timing {where}"
    cell.seconds.update(attempts(part, lambda: time_in_turn(model, steps, repeats)) or {})
    if not cell.seconds:
        cell.missing.update(dict.fromkeys(steps, attempts.word(part)))
    return cell


def cell_lines(
    cell: Cell, size: tuple[int, int], plain: list[str], backends: list[str], ideal: float
) -> Iterator[tuple]:
    """A line of the table for each backend."""
    prompt, response = size
    best, flash = (fastest(cell, names) for names in (plain, plain[1:]))
    bound = 2 * (prompt + response) / (prompt + 2 * response)
    published = dict(zip(PUBLISHED_RESPONSES, PUBLISHED.get(prompt, ()), strict=False))
    for name in backends:
        gain, lost = speed_up(cell, best, name)
        over_flash, without = (None, "-") if flash is None else speed_up(cell, flash, name)
        yield (
            prompt,
            response,
            name,
            *(milliseconds(cell, x) for x in (plain[0], flash, name)),
            entry(gain, missing=lost),
            ideal,
            bound,
            entry(gain, 1 / ideal, lost),
            *(entry(cell.peaks.get(x), 2**-30, cell.missing[x]) for x in (best, name)),
            entry(cell.errors.get(name), missing=lost),
            entry(over_flash, missing=without),
            published.get(response, "-"),
        )


def fastest(cell: Cell, names: list[str]) -> str | None:
    """None if there are no names."""
    return min(names, key=lambda name: cell.seconds.get(name, inf), default=None)


def speed_up(cell: Cell, unshared: str, shared: str) -> tuple[float | None, str]:
    """Of one side over another, and why there is none."""
    seconds = cell.seconds
    if unshared in seconds and shared in seconds:
        return seconds[unshared] / seconds[shared], ""
    return None, cell.missing[shared if unshared in seconds else unshared]


def milliseconds(cell: Cell, name: str | None) -> float | str:
    """A dash for a side that is not there at all."""
    return "-" if name is None else entry(cell.seconds.get(name), 1e3, cell.missing[name])


def ideal_ratio(model: PreTrainedModel, ids: Tensor, args: argparse.Namespace) -> float:
    """FLOPs of the step unshared over FLOPs of it shared."""
    options = {"checkpointing": args.checkpointing, "frozen": args.frozen}
    tree, lengths = PrefixTree.from_rows(ids), [ids.shape[1]] * len(ids)
    before = step_flops(model.config, sum(lengths), row_pairs(lengths), **options)
    return before / step_flops(model.config, tree.packed_tokens, tree_pairs(tree), **options)


def draw(figure: Any, table: list[tuple]) -> None:
    """A heat map for each backend."""
    maps: dict[str, dict] = {}
    for row in table:
        values = dict(zip(HEADER, row, strict=True))
        cells = maps.setdefault(values["backend"], {})
        cells[values["prompt"], values["response"]] = values["speed-up"], values["ideal"]
    heat_maps(figure, maps, "response tokens", "prompt tokens")


if __name__ == "__main__":
    main()
