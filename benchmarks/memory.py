"""The longest prompt whose training step fits a memory budget, shared and unshared.

    python benchmarks/memory.py [--budget 0.25] [--response 128] [--shape small] [--out FOLDER]

One pair, forward and backward of the decoder without LM head, with and without gradient
checkpointing. The budget is what a step may hold beyond the weights and their gradients. The ideal
is 2: rows hold `2(P+R)` tokens and the packed row `P+2R`, so the same number of tokens has room for
a prompt of twice the length. What has the size of the rows on both sides, such as the hidden states
that the caller gets back, keeps the ratio below that.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

from charts import lines_to_limit
from decoder import build_decoder
from grid import random_pair, step, warm_up
from measure import GrowingTable, Side, entry, fits, parse, peak_memory, setting
from tqdm import tqdm
from transformers import PreTrainedModel

DEFAULTS = {
    "cpu": {"budget": 0.25, "response": 128},
    "cuda": {"budget": 16.0, "response": 512},
}
IDEAL = 2.0
HEADER = (
    "checkpointing",
    "unshared prompt",
    "shared prompt",
    "ratio",
    "ideal",
    "share of ideal",
    "unshared GiB",
    "shared GiB",
)


def main(argv: list[str] | None = None) -> None:
    args = parse(options(), argv, DEFAULTS)
    sides = [Side("unshared"), Side("shared", args.backend)]
    title = f"Longest prompt in {args.budget:g} GiB, {args.shape} decoder on {args.device}"
    title += ", weights frozen" if args.frozen else ""
    note = f"{setting(args)}, one pair, responses of {args.response} tokens, prompts in steps of "
    note += f"{args.grain}; budget and GiB are beyond the weights and their gradients"
    table = GrowingTable(title, HEADER, args.out, note)
    attempts = table.attempts
    lines: dict[str, dict[int, float]] = {}
    for checkpointing in (False, True):
        model = build_decoder(
            args.shape, args.device, args.dtype, checkpointing=checkpointing, frozen=args.frozen
        )
        word = "on" if checkpointing else "off"
        found = []
        for side in sides:
            name = f"{side.name}, checkpointing {word}"
            measured = attempts(name, partial(search, model, side, args, name))
            found.append(measured or attempts.word(name))
            if measured:
                lines[name] = measured
        table.add([line(word, found, args.budget)])
        del model
    table.finish(lambda figure: draw(figure, lines, args))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--budget", type=float, help="GiB beyond the weights and their gradients")
    add("--response", type=int, help="tokens of each answer")
    add("--grain", type=int, default=64, help="prompts are multiples of this")
    add("--limit", type=int, default=2**17, help="longest prompt to try")
    add("--backend", default="auto", help="of sharing")
    return parser


def line(word: str, found: list[dict[int, float] | str], budget: float) -> tuple:
    """A line of the table: the longest prompts of both sides, or why there is none."""
    missing = next((x for x in found if isinstance(x, str)), "")
    prompts = [x if isinstance(x, str) else longest(x, budget) for x in found]
    peaks = [x if isinstance(x, str) else x[longest(x, budget)] for x in found]
    ratio = None if missing else prompts[1] / prompts[0]
    shares = entry(ratio, missing=missing), IDEAL, entry(ratio, 1 / IDEAL, missing)
    return (word, *prompts, *shares, *peaks)


def search(
    model: PreTrainedModel, side: Side, args: argparse.Namespace, name: str
) -> dict[int, float]:
    """GiB at each prompt length that was tried on the way to the longest that fits."""
    warm_up(model, [side])
    progress = tqdm(desc=name, unit=" steps")

    def peak(prompt: int) -> float:
        rows = random_pair(prompt, args.response, model)
        with side.on(model):
            size = fits(lambda: peak_memory(model, lambda: step(model, *rows)))
        progress.update()
        return inf if size is None else size / 2**30

    with progress:
        return bracket(peak, args.budget, args.grain, args.limit)


def bracket(
    peak: Callable[[int], float], budget: float, grain: int, limit: int
) -> dict[int, float]:
    """Peaks at the multiples of `grain` tried, until one fits the budget and the next does not.

    Raises:
        ValueError: not even the first one fits, or even the last one does.
    """
    measured: dict[int, float] = {}
    low, high, guess = 0, limit // grain + 1, 1  # in grains: fits, does not fit
    while high - low > 1:
        measured[guess * grain] = peak(guess * grain)
        fitted = measured[guess * grain] <= budget
        low, high = (guess, high) if fitted else (low, guess)
        guess = next_guess(measured, budget, grain, low, high)
    if low == 0 or high > limit // grain:
        raise ValueError(
            f"a budget of {budget:g} GiB is met outside of {grain} to {limit} prompt tokens; give "
            "another --budget, --grain or --limit"
        )
    return measured


def next_guess(measured: dict[int, float], budget: float, grain: int, low: int, high: int) -> int:
    """Where the line through the two nearest peaks meets the budget, at most 8 times as far.

    Memory is nearly a straight line over the prompt. Where it ran out, or the line leads out of
    what is left, the interval is halved.
    """
    near = sorted(measured.items(), key=lambda point: abs(point[1] - budget))[:2]
    if len(near) < 2 or near[0][1] == near[1][1]:
        guess = 2 * low
    elif near[1][1] == inf:
        guess = high
    else:
        (p, at_p), (q, at_q) = near
        meets = p + (budget - at_p) * (q - p) / (at_q - at_p)
        guess = min(int(meets // grain), 8 * low)
    return (low + high) // 2 if guess >= high else max(guess, low + 1)


def longest(measured: dict[int, float], budget: float) -> int:
    return max(prompt for prompt, peak in measured.items() if peak <= budget)


def draw(figure: Any, lines: dict[str, dict[int, float]], args: argparse.Namespace) -> None:
    """Peak memory over the prompt length, a line for each side."""
    points = {
        name: [point for point in measured.items() if point[1] < inf]
        for name, measured in lines.items()
    }
    lines_to_limit(figure, points, args.budget, "prompt tokens", "peak memory of a step, GiB")


if __name__ == "__main__":
    main()
