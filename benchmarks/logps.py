"""Peak memory and time of log-probs against full logits, at a 128k vocabulary.

    python benchmarks/logps.py [--hidden 576 ...] [--tokens 64 ...] [--prompt-tokens 512] [--out F]

The LM head alone, forward and backward, of a batch whose hidden states are those of prompt tokens
and of completion tokens: logits of all of them, as an unmodified script computes them, logits of
the completion tokens only, and `linear_logps`. The head is frozen, as under LoRA, or trained.
Speed-ups and memory ratios are over the first. The ideal is the ratio of FLOPs in matrix products,
with what `linear_logps` computes twice counted twice. The peak is beyond hidden states and weight,
gradients included. Errors are the largest against fp64, that of the gradient of the hidden states
over the largest gradient.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import Attempts, GrowingTable, entry, medians, parse_call
from report import machine
from torch import Tensor
from tqdm import tqdm

from hf_prefix_patch.head import linear_logps
from hf_prefix_patch.measuring import peak_of, seconds_of

DEFAULTS = {
    "cpu": {
        "hidden": [576, 1536],
        "tokens": [64, 256],
        "prompt_tokens": 512,
        "dtype": "float32",
        "repeats": 3,
    },
    "cuda": {
        "hidden": [2048, 4096],
        "tokens": [1024, 4096],
        "prompt_tokens": 4096,
        "dtype": "bfloat16",
        "repeats": 10,
    },
}
HEADER = (
    "hidden",
    "prompt tokens",
    "completion tokens",
    "head",
    "way",
    "seconds",
    "speed-up",
    "ideal",
    "share of ideal",
    "peak MiB",
    "memory ratio",
    "error",
    "gradient error",
)


def main(argv: list[str] | None = None) -> None:
    args = parse_call(options(), argv, DEFAULTS)
    sizes = [(h, c) for h in args.hidden for c in args.tokens]
    where = f"{args.device}, {args.threads} threads" if args.device == "cpu" else args.device
    setting = f"{machine(args.device)}, {str(args.dtype).removeprefix('torch.')}, vocabulary of "
    setting += f"{args.vocab}, forward and backward, median of {args.repeats}"
    table = GrowingTable(f"Log-probs against full logits on {where}", HEADER, args.out, setting)
    for hidden, tokens in tqdm(sizes, desc="hidden x tokens"):
        batch = random_batch(hidden, tokens, args)
        truth = run_in_fp64(batch)
        for trained in (False, True):
            table.add(lines(batch, truth, trained, args.repeats, table.attempts))
    table.finish(lambda figure: draw(figure, table.lines))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--vocab", type=int, default=128256, help="tokens in the vocabulary; that of Llama 3")
    add("--hidden", type=int, nargs="+", help="sizes of a hidden state")
    add("--tokens", type=int, nargs="+", help="completion tokens of the batch")
    add("--prompt-tokens", type=int, help="of the batch")
    add("--repeats", type=int)
    return parser


class Batch(NamedTuple):
    """Hidden states `[P + C, H]`, prompts first, and the gradient `[C]` of a loss."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    prompt: int
    direction: Tensor


def random_batch(hidden: int, tokens: int, args: argparse.Namespace) -> Batch:
    """Hidden states of unit variance, which a norm before the head makes; logits are as large."""
    generator = torch.Generator().manual_seed(0)
    total = args.prompt_tokens + tokens
    states = torch.randn(total, hidden, generator=generator)
    weight = torch.randn(args.vocab, hidden, generator=generator) / hidden**0.5
    target = torch.randint(args.vocab, (total,), generator=generator)
    direction = torch.randn(tokens, generator=generator)
    return Batch(
        states.to(args.device, args.dtype),
        weight.to(args.device, args.dtype),
        target.to(args.device),
        args.prompt_tokens,
        direction.to(args.device),
    )


def logps_of_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def all_logits(hidden: Tensor, weight: Tensor, target: Tensor, prompt: int) -> Tensor:
    return logps_of_logits(hidden, weight, target)[prompt:]


def completion_logits(hidden: Tensor, weight: Tensor, target: Tensor, prompt: int) -> Tensor:
    return logps_of_logits(hidden[prompt:], weight, target[prompt:])


def no_logits(hidden: Tensor, weight: Tensor, target: Tensor, prompt: int) -> Tensor:
    return linear_logps(hidden[prompt:], weight, None, target[prompt:])


WAYS: dict[str, Callable[..., Tensor]] = {
    "all logits": all_logits,
    "completion logits": completion_logits,
    "linear_logps": no_logits,
}


def step_flops(name: str, batch: Batch, trained: bool) -> int:
    """FLOPs of a step's matrix products.

    Logits, the gradient of the hidden states and that of the weight are one product each; for the
    last `linear_logps` computes the logits again.
    """
    products = 2 + trained + (trained and name == "linear_logps")
    tokens = len(batch.hidden) if name == "all logits" else len(batch.direction)
    return 2 * tokens * batch.weight.numel() * products


def step(name: str, batch: Batch, trained: bool) -> tuple[Tensor, ...]:
    """Log-probs `[C]`, and the gradients of hidden states and weight."""
    inputs = [batch.hidden.detach().requires_grad_()]
    weight = batch.weight.detach().requires_grad_(trained)
    if trained:
        inputs.append(weight)
    logps = WAYS[name](inputs[0], weight, batch.target, batch.prompt)
    return logps.detach(), *torch.autograd.grad(logps, inputs, batch.direction.to(logps.dtype))


def run_in_fp64(batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient of completion tokens, a few at a time: each is on its own."""
    weight = batch.weight.double()
    logps, gradients = [], []
    pieces = (batch.hidden[batch.prompt :], batch.target[batch.prompt :], batch.direction)
    for hidden, target, direction in zip(*(x.split(64) for x in pieces), strict=True):
        piece = Batch(hidden.double(), weight, target, 0, direction)
        for found, x in zip(
            (logps, gradients), step("completion logits", piece, False), strict=True
        ):
            found.append(x)
    return torch.cat(logps), torch.cat(gradients)


def lines(
    batch: Batch, truth: tuple[Tensor, Tensor], trained: bool, repeats: int, attempts: Attempts
) -> list[tuple[Any, ...]]:
    """A line of the table for each way; one that fails leaves the others as they are."""
    device, kind = batch.hidden.device, "trained" if trained else "frozen"
    errors, steps, why = {}, {}, dict.fromkeys(WAYS, "")
    for name in WAYS:
        part = f"{name}, {kind} head, hidden {batch.hidden.shape[1]}, {len(batch.direction)} tokens"
        found = attempts(part, partial(step, name, batch, trained))
        if found is None:
            why[name] = attempts.word(part)
        else:
            errors[name] = errors_of(found, truth, batch.prompt)
            steps[name] = partial(step, name, batch, trained)
        del found
    peaks = {name: peak_of(call, device) / 2**20 for name, call in steps.items()}
    timers = {name: partial(seconds_of, call, device) for name, call in steps.items()}
    seconds = medians(timers, repeats)
    table = []
    for name in WAYS:
        ideal = step_flops("all logits", batch, trained) / step_flops(name, batch, trained)
        gain = ratio(seconds, name)
        lost = why["all logits"] or why[name]
        table.append(
            (
                batch.hidden.shape[1],
                batch.prompt,
                len(batch.direction),
                kind,
                name,
                entry(seconds.get(name), missing=why[name]),
                entry(gain, missing=lost),
                ideal,
                entry(gain, 1 / ideal, lost),
                entry(peaks.get(name), missing=why[name]),
                entry(ratio(peaks, name), missing=lost),
                *(entry(x, missing=why[name]) for x in errors.get(name, (None, None))),
            )
        )
    return table


def errors_of(
    found: tuple[Tensor, ...], truth: tuple[Tensor, Tensor], prompt: int
) -> tuple[float, float]:
    logps, gradient = (x - y for x, y in zip((found[0], found[1][prompt:]), truth, strict=True))
    return logps.abs().max().item(), (gradient.abs().max() / truth[1].abs().max()).item()


def ratio(values: dict[str, float], name: str) -> float | None:
    """How many times less than all logits; None where one of the two is not there."""
    if "all logits" not in values or name not in values:
        return None
    return values["all logits"] / values[name]


def draw(figure: Any, table: list[tuple[Any, ...]]) -> None:
    """Speed-up with its ideal, and peak memory, for each size and head."""
    rows = [dict(zip(HEADER, row, strict=True)) for row in table]
    groups = list(dict.fromkeys(group_name(row) for row in rows))
    figure.set_size_inches(max(8, 1.3 * len(groups)), 7)
    times, memory = figure.subplots(2, 1, sharex=True)
    for i, name in enumerate(WAYS):
        mine = [row for row in rows if row["way"] == name]
        places = [groups.index(group_name(row)) + 0.27 * (i - 1) for row in mine]
        for axes, key in ((times, "speed-up"), (memory, "peak MiB")):
            values = [0 if isinstance(row[key], str) else row[key] for row in mine]
            axes.bar(places, values, 0.27, label=name if axes is times else None)
        label = "ideal" if i == 0 else None
        ideals = [row["ideal"] for row in mine]
        times.scatter(places, ideals, marker="_", s=90, color="black", zorder=3, label=label)
    times.set_ylabel("speed-up over all logits")
    memory.set(ylabel="peak MiB", yscale="log")
    memory.set_xticks(range(len(groups)), groups)
    figure.legend(loc="outside upper center", ncols=len(WAYS) + 1, frameon=False)


def group_name(row: dict[str, Any]) -> str:
    return f"{row['head']} head\nhidden {row['hidden']}\n{row['completion tokens']} tokens"


if __name__ == "__main__":
    main()
