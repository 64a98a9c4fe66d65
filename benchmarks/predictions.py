"""What `hf-prefix-patch estimate` predicts, against what is measured on the same batches.

    python benchmarks/predictions.py --data PATH ... [--models smollm2 decoder] [--out FOLDER]

The same batches run padded through the unpatched model, packed with nothing shared, shared in pairs
and shared across the batch (see `preference_sets.py`), by two models: SmolLM2-135M in the step of
TRL's DPO trainer with LoRA and checkpointing, the LM head on completion tokens as on CUDA, and a
decoder with random weights in the step of `preference_sets.py`: on a CPU a 14th of Qwen2.5-1.5B,
two of its layers and as much of its vocabulary, so that parts weigh as they do in the whole.
Seconds are medians over the repeats, summed over the batches. The prediction is that of `estimate`:
the same functions are given the same batches. That the decoder runs on as many tokens as they count
is checked in every mode. What a step costs whatever its tokens are (starting kernels, the trainer)
is not predicted and weighs more the smaller the batch and the narrower the model.
"""

import argparse
import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from decoder import build_decoder
from measure import keep_freed_memory, parse, setting
from pairs import Batch, collate, in_mode, load_tokenizer, read_pairs, renumber
from preference_sets import MODES
from preference_sets import measure as measure_decoder
from report import write_table
from tqdm import tqdm
from trl_step import build_trainer, completion_head, step

from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.estimate import Setting, epoch_of, random_epochs
from hf_prefix_patch.flops import DecoderShape
from hf_prefix_patch.workload import Pairs, Way, work_of

HEADER = ("set", "model", "what", "slower s", "faster s", "predicted", "measured")
HEADER += ("predicted / measured", "token ratio")
GAINS = {
    "padding removed": ("padded", "packed"),
    "sharing in pairs": ("packed", "in pairs"),
    "sharing across pairs": ("packed", "across"),
    "both": ("padded", "across"),
}
DEFAULTS = {
    "cpu": {
        "pairs": 4,
        "decoder_pairs": 8,
        "batches": 1,
        "repeats": 3,
        "shape": "1.5b/14",
        "frozen": True,
        "checkpointing": False,
        "max_length": 512,
    },
    "cuda": {
        "pairs": 8,
        "decoder_pairs": 8,
        "batches": 8,
        "repeats": 5,
        "frozen": True,
        "checkpointing": True,
        "max_length": 2048,
    },
}


def main(argv: list[str] | None = None) -> None:
    args = parse(options(), argv, DEFAULTS)
    keep_freed_memory()
    table: list[tuple] = []
    for path in args.data:
        for model in args.models:
            table += {"smollm2": with_trl, "decoder": with_decoder}[model](path, args)
    title = f"Predicted and measured speed-ups on {args.device}"
    note = f"{setting(args)}; SmolLM2: TRL's DPO step, LoRA, checkpointing on, fp32; "
    note += f"{args.batches} batches of {args.pairs} pairs, of the decoder {args.decoder_pairs}, "
    note += f"median of {args.repeats}, at most {args.max_length} tokens a row"
    write_table(title, HEADER, table, args.out, note)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="JSONL: prompt, chosen, rejected")
    add("--models", nargs="+", choices=["smollm2", "decoder"], default=["smollm2", "decoder"])
    add("--model", help="folder of a causal LM in place of SmolLM2-135M-Instruct")
    add("--pairs", type=int, help="pairs in a batch")
    add("--decoder-pairs", type=int, help="the same for the decoder with random weights")
    add("--batches", type=int, help="batches of each set")
    add("--repeats", type=int, help="times each batch is timed in each mode")
    add("--max-length", type=int, help="longer rows are cut at the end")
    add("--modes", nargs="+", choices=get_args(Way), default=list(MODES), help="of SmolLM2's step")
    add("--vocab", type=int, help="of the decoder's LM head; default: that of its shape")
    add("--backend", default="auto", help="of the packed modes")
    return parser


def with_trl(path: Path, args: argparse.Namespace) -> Iterator[tuple]:
    """Lines of a stock trainer's step."""
    trainer = build_trainer(
        Namespace(model=args.model, data=str(path), pairs=args.pairs, max_length=args.max_length)
    )
    run = Setting(args.pairs, max_length=args.max_length, epochs=1)
    examples = trainer.train_dataset
    batches = random_epochs(len(examples), run)[: args.batches]
    pairs = Pairs.of(examples, args.max_length)
    shape = DecoderShape.of(trainer.model.config)
    seconds = dict.fromkeys(args.modes, 0.0)
    with completion_head():
        for indices in tqdm(batches, desc=f"{path.stem}, TRL"):
            rows = trainer.data_collator([examples[i] for i in indices])
            batch = Batch(*(rows[x] for x in ("input_ids", "attention_mask", "completion_mask")))
            for mode, taken in time_steps(trainer, batch, pairs, indices, args).items():
                seconds[mode] += taken
    name = Path(trainer.model.config._name_or_path).name
    yield from lines((path.stem, name), pairs, batches, seconds, run, shape)


def time_steps(
    trainer: Any, batch: Batch, pairs: Pairs, indices: list[int], args: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of a step in each mode, in turn; one more that warms up and is checked."""
    modes = {mode: in_mode(batch, mode)[0] for mode in args.modes}
    taken: dict[str, list[float]] = {mode: [] for mode in modes}
    for repeat in range(args.repeats + 1):
        losses = {}
        for mode, rows in modes.items():
            inputs = vars(rows)
            if mode == "padded":
                seconds, losses[mode], _ = step(trainer, inputs)
            else:
                options = {"backend": args.backend, "verify": False, "on_bypass": "ignore"}
                with enable_prefix_sharing(trainer, **options) as sharing:
                    seconds, losses[mode], _ = step(trainer, inputs)
                stats = sharing.stats
                if stats.calls:  # else there was nothing to gain
                    check_tokens(mode, stats.packed_tokens / stats.calls, pairs, indices)
            if repeat:
                taken[mode].append(seconds)
        if {"padded", "across"} <= set(losses) and abs(losses["padded"] - losses["across"]) > 1e-3:
            raise RuntimeError(f"padded and shared losses differ: {losses}")
    return {mode: statistics.median(times) for mode, times in taken.items()}


def with_decoder(path: Path, args: argparse.Namespace) -> Iterator[tuple]:
    """Lines of a decoder with random weights, whose tokens `preference_sets` checks."""
    changes = {} if args.vocab is None else {"vocab_size": args.vocab}
    options = {"checkpointing": args.checkpointing, "frozen": args.frozen}
    model = build_decoder(args.shape, args.device, args.dtype, head=True, **options, **changes)
    size = args.decoder_pairs
    count = size * args.batches
    drawn = read_pairs(path, load_tokenizer(args.model), count, args.max_length)
    drawn = renumber(drawn, model.config.vocab_size)
    batches = [list(range(i, i + size)) for i in range(0, count, size)]
    rows = [collate([drawn[i] for i in batch], args.max_length, args.device) for batch in batches]
    pairs = Pairs.of(
        [
            {"prompt_ids": x.prompt, "chosen_ids": x.chosen, "rejected_ids": x.rejected}
            for x in drawn
        ],
        args.max_length,
    )
    for batch, indices in zip(rows, batches, strict=True):
        for mode in MODES:
            check_tokens(mode, in_mode(batch, mode)[1], pairs, indices)
    seconds = measure_decoder(model, rows, args, f"{path.stem}, {args.shape}").seconds
    run = Setting(size, reference=False, head_again=False, epochs=1, **options)
    shape = DecoderShape.of(model.config)
    yield from lines((path.stem, args.shape), pairs, batches, seconds, run, shape)


def check_tokens(mode: Any, tokens: float, pairs: Pairs, indices: list[int]) -> None:
    """Raise a RuntimeError unless `work_of` counts the same in this batch."""
    (work,) = work_of(pairs, [indices], mode)
    if work.tokens != tokens:
        raise RuntimeError(f"{mode}: the decoder ran on {tokens} tokens, not on {work.tokens}")


def lines(
    names: tuple[str, str],
    pairs: Pairs,
    batches: Sequence[Sequence[int]],
    seconds: dict[str, float],
    run: Setting,
    shape: DecoderShape,
) -> Iterator[tuple]:
    """A line for each gain whose two modes were measured."""
    epochs = {mode: epoch_of(pairs, batches, mode, run, shape) for mode in seconds}
    for gain, (slower, faster) in GAINS.items():
        if {slower, faster} <= set(seconds):
            measured = seconds[slower] / seconds[faster]
            predicted = epochs[slower].cost / epochs[faster].cost
            tokens = epochs[slower].tokens / epochs[faster].tokens
            times = seconds[slower], seconds[faster]
            yield (*names, gain, *times, predicted, measured, predicted / measured, tokens)


if __name__ == "__main__":
    main()
