"""What packing and sharing each gain in a preference step, on real sets and synthetic ones.

    python benchmarks/preference_sets.py                      six synthetic sets
    python benchmarks/preference_sets.py --data PATH ...      JSONL with prompt, chosen, rejected

The same pairs run four ways: padded rows through the unpatched model; packed, nothing shared;
shared within each pair; shared across the whole batch. The library shares what has equal tokens, so
the two in the middle differ from the last by the first token of their rows alone: one of its own
for every row, or for every pair.

A step is forward and backward of a causal LM. The LM head projects completion tokens only, and the
loss is SimPO's: mean log-probs, so that random weights do not saturate it. The ideal is the ratio
of the FLOPs of decoder and head. "packing" and "all" may pass theirs, as attention under a padding
mask computes more than the visible pairs that are counted for it.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from charts import grouped_bars
from decoder import build_decoder, row_pairs, step_flops, tree_pairs
from measure import GrowingTable, Side, parse, peak_memory, setting, time_in_turn
from pairs import (
    MODES,
    Batch,
    Pair,
    collate,
    in_mode,
    load_tokenizer,
    read_pairs,
    renumber,
    synthetic_pairs,
)
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from hf_prefix_patch import PrefixTree

# arXiv 2410.20305: median length, here that of a row; ratio of prompt to completion; speed-up of
# FlexAttention with sharing and packing over FA3 with packing, on 8 H100.
PAPER = {
    "Capybara": (1160, 1.59, 1.34),
    "HH-RLHF": (186, 2.15, 1.41),
    "MetaMath-DPO": (872, 3.91, 1.57),
    "TLDR": (416, 11.14, 1.35),
    "Tulu-HelpSteer": (775, 6.34, 1.48),
    "UltraFeedback": (409, 0.42, 1.17),
}
# What each ratio divides by what.
RATIOS = {
    "packing": ("padded", "packed"),
    "sharing in pairs": ("packed", "in pairs"),
    "sharing across": ("packed", "across"),
    "all": ("padded", "across"),
}
DEFAULTS = {
    "cpu": {"pairs": 2, "batches": 2, "repeats": 3, "checkpointing": False},
    "cuda": {"pairs": 4, "batches": 8, "repeats": 3, "checkpointing": True},
}


class Totals(NamedTuple):
    """Of one set: seconds and FLOPs of each mode summed over batches, its highest peak memory."""

    seconds: dict[str, float]
    flops: dict[str, int]
    peaks: dict[str, int]
    loss_error: float


def main(argv: list[str] | None = None) -> None:
    args = parse(options(), argv, DEFAULTS)
    changes = {} if args.vocab is None else {"vocab_size": args.vocab}
    model = build_decoder(
        args.shape,
        args.device,
        args.dtype,
        head=True,
        checkpointing=args.checkpointing,
        frozen=args.frozen,
        **changes,
    )
    ratios = [column for name in RATIOS for column in (name, f"{name}: ideal")]
    header = ("set", "prompt", "completion", *(f"{mode} s" for mode in MODES), *ratios)
    header += ("paper: sharing", *(f"{mode} GiB" for mode in MODES), "loss difference")
    title = f"Packing and sharing, {'real' if args.data else 'synthetic'} preference sets, "
    title += f"{args.shape} decoder on {args.device}{', in file order' if args.keep_order else ''}"
    note = f"{setting(args)}, {args.pairs} pairs a batch, {args.batches} batches, "
    note += f"at most {args.max_length} tokens a row, vocabulary {model.config.vocab_size}"
    note += f", median of {args.repeats} for each batch"
    note += "" if args.data else f", lengths log-normal with sigma {args.sigma}"
    table = GrowingTable(title, header, args.out, note)
    attempts = table.attempts
    for name, pairs in named_sets(args, model.config.vocab_size):
        totals = attempts(name, partial(measure_set, model, pairs, args, name))
        table.add([line(name, pairs, totals, attempts.word(name))])
    table.finish(lambda figure: draw(figure, table.lines))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, nargs="+", help="JSONL files; synthetic sets if not given")
    add("--tokenizer", help="folder of a tokenizer; that of SmolLM2 if not given")
    add("--keep-order", action="store_true", help="pairs of a file as they come, not shuffled")
    add("--sets", nargs="+", choices=PAPER, default=list(PAPER), help="synthetic sets")
    add("--sigma", type=float, default=0.5, help="of the logarithm of synthetic lengths")
    add("--pairs", type=int, help="pairs in a batch")
    add("--batches", type=int, help="batches of each set")
    add("--repeats", type=int, help="times each batch is timed")
    add("--max-length", type=int, default=2048, help="longer rows are cut at the end")
    add("--vocab", type=int, help="of the LM head; default: that of the shape")
    add("--backend", default="auto", help="of the packed modes")
    return parser


def named_sets(args: argparse.Namespace, vocab: int) -> Iterator[tuple[str, list[Pair]]]:
    """Name and pairs of every set asked for."""
    count = args.pairs * args.batches
    if not args.data:
        for name in args.sets:
            length, ratio, _ = PAPER[name]
            yield name, synthetic_pairs(count, length, ratio, args.sigma, vocab)
        return
    tokenizer = load_tokenizer(args.tokenizer)
    for path in args.data:
        pairs = read_pairs(path, tokenizer, count, args.max_length, not args.keep_order)
        yield path.stem, renumber(pairs, vocab)


def measure_set(
    model: PreTrainedModel, pairs: list[Pair], args: argparse.Namespace, name: str
) -> Totals:
    batches = [
        collate(pairs[i : i + args.pairs], args.max_length, args.device)
        for i in range(0, len(pairs), args.pairs)
    ]
    return measure(model, batches, args, name)


def measure(
    model: PreTrainedModel, batches: list[Batch], args: argparse.Namespace, name: str
) -> Totals:
    """Run every batch of a set in all modes.

    Raises:
        RuntimeError: a mode ran on other tokens than it should, or the same tokens gave two losses.
    """
    sides = {mode: Side(mode, None if mode == "padded" else args.backend) for mode in MODES}
    options = {"checkpointing": args.checkpointing, "frozen": args.frozen}
    totals = Totals(*(dict.fromkeys(MODES, 0) for _ in range(3)), 0.0)
    for batch in tqdm(batches, desc=name):
        modes = {mode: in_mode(batch, mode) for mode in MODES}
        losses = {}
        for mode, (rows, tokens) in modes.items():
            losses[mode], peak = first_step(model, sides[mode], rows, tokens)
            totals.peaks[mode] = max(totals.peaks[mode], peak)
            totals.flops[mode] += mode_flops(model.config, rows, mode, **options)
        error = abs(losses["padded"] - losses["across"])
        if error > torch.finfo(args.dtype).eps ** 0.5:
            raise RuntimeError(f"{name}: padded and shared losses differ by {error:.2e}")
        steps = {m: (sides[m], partial(step, model, rows)) for m, (rows, _) in modes.items()}
        for mode, seconds in time_in_turn(model, steps, args.repeats).items():
            totals.seconds[mode] += seconds
        totals = totals._replace(loss_error=max(totals.loss_error, error))
    return totals


def first_step(model: PreTrainedModel, side: Side, batch: Batch, tokens: int) -> tuple[float, int]:
    """Loss and peak memory of a step that also warms up, with a check on what the decoder saw."""
    loss = []
    with side.on(model) as sharing:
        peak = peak_memory(model, lambda: loss.append(step(model, batch)))
    packed = batch.input_ids.numel()
    if sharing is not None and sharing.stats.calls:  # else there was nothing to gain
        packed = sharing.stats.packed_tokens
    if packed != tokens:
        raise RuntimeError(f"{side.name}: the decoder ran on {packed} tokens, not on {tokens}")
    return loss[0].item(), peak


def step(model: PreTrainedModel, batch: Batch) -> Tensor:
    loss = preference_loss(model, batch)
    loss.backward()
    return loss.detach()


def preference_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Reference-free: `-log sigmoid` of the difference of mean log-probs (SimPO, beta 1)."""
    hidden = model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    completion = batch.completion_mask[:, 1:].bool()
    logits = model.lm_head(hidden[:, :-1][completion]).float()
    logps = -F.cross_entropy(logits, batch.input_ids[:, 1:][completion], reduction="none")
    row = completion.nonzero()[:, 0]
    sums = logps.new_zeros(len(completion)).index_add(0, row, logps)
    chosen, rejected = (sums / completion.sum(1).clamp(min=1)).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def mode_flops(config: PretrainedConfig, batch: Batch, mode: str, **options: bool) -> int:
    """FLOPs of a step; `options` are those of `step_flops`."""
    if mode == "padded":
        rows, length = batch.input_ids.shape
        tokens, pairs = rows * length, row_pairs([length] * rows)
    else:
        tree = PrefixTree.from_rows(batch.input_ids, batch.attention_mask)
        tokens, pairs = tree.packed_tokens, tree_pairs(tree)
    head_tokens = int(batch.completion_mask[:, 1:].sum())
    return step_flops(config, tokens, pairs, head_tokens=head_tokens, **options)


def line(name: str, pairs: list[Pair], totals: Totals | None, missing: str) -> tuple:
    """A line of the table; without totals, the word that says why there are none."""
    prompt = median(len(pair.prompt) for pair in pairs)
    completion = median(len(x) for pair in pairs for x in (pair.chosen, pair.rejected))
    published = PAPER[name][2] if name in PAPER else "-"
    if totals is None:
        words = [missing] * (len(MODES) + 2 * len(RATIOS))
        return (name, prompt, completion, *words, published, *[missing] * (len(MODES) + 1))
    ratios = [
        part[over] / part[under]
        for over, under in RATIOS.values()
        for part in (totals.seconds, totals.flops)
    ]
    peaks = [peak / 2**30 for peak in totals.peaks.values()]
    seconds = totals.seconds.values()
    return (name, prompt, completion, *seconds, *ratios, published, *peaks, totals.loss_error)


def draw(figure: Any, table: list[tuple]) -> None:
    """Bars of the ratios for every set that has them."""
    table = [row for row in table if not isinstance(row[3], str)]
    if not table:
        return
    first = 3 + len(MODES)
    bars = {
        name: [(row[first + 2 * i], row[first + 2 * i + 1]) for row in table]
        for i, name in enumerate(RATIOS)
    }
    grouped_bars(figure, [row[0] for row in table], bars, "speed-up")


if __name__ == "__main__":
    main()
