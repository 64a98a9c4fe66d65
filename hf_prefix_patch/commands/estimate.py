"""Say what sharing would gain on a data set.

Counts the tokens of an epoch as TRL pads them, packed, and shared, predicts the speed-up for a
model from its config, and suggests a token budget. No model is loaded.

  hf-prefix-patch estimate pairs.jsonl --tokenizer Qwen/Qwen2.5-7B-Instruct
  hf-prefix-patch estimate pairs.parquet --tokenizer model/ --batch-size 4 --plot gain.png
  hf-prefix-patch estimate saved_dataset/ --tokenizer model/ --max-tokens 16384 --json

DATA is a JSONL, JSON or Parquet file or a folder saved by datasets, with the columns chosen and
rejected, and prompt unless both begin with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_prefix_patch.commands.output import reader_may_leave, with_notes
from hf_prefix_patch.options import count, name, seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="file or folder of preference pairs")
    tokenizer = "folder or name of the model's tokenizer"
    add("--tokenizer", required=True, type=name, metavar="T", help=tokenizer)
    add(
        "--model-config",
        type=name,
        metavar="C",
        help="config.json, folder or name of the model, or none to count tokens alone; default: "
        "that beside the tokenizer",
    )
    add("--batch-size", type=count, default=8, metavar="B", help="pairs in a batch (default 8)")
    add("--max-tokens", type=count, metavar="M", help="token budget to look at; default: suggested")
    add(
        "--max-length",
        type=_length,
        default=1024,
        metavar="L",
        help="rows are cut to it, or none (default 1024, as TRL's)",
    )
    add("--truncation-mode", choices=["keep_start", "keep_end"], default="keep_start")
    add("--no-reference", action="store_true", help="no reference model (ORPO, SimPO, reward)")
    add("--no-checkpointing", action="store_true", help="no gradient checkpointing")
    add("--full", action="store_true", help="full fine-tuning; default: a frozen base under LoRA")
    add(
        "--head",
        choices=["completion", "cells"],
        default="completion",
        help="LM head on completion tokens (TRL on CUDA, completion_logps; default), or on all "
        "cells of the rows (TRL elsewhere)",
    )
    add(
        "--attention",
        choices=["sdpa", "flash"],
        default="sdpa",
        help="of padded rows: sdpa computes what a padding mask hides (default), flash does not",
    )
    add(
        "--limit",
        type=count,
        metavar="N",
        help="look at N pairs drawn at random, which tears pairs of one prompt apart",
    )
    add("--seed", type=seed, default=0, help="of drawing and shuffling (default 0)")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=Path, metavar="FILE", help="write a chart, such as gain.png")


def main(arguments: argparse.Namespace) -> None:
    from hf_prefix_patch import estimate_report as report
    from hf_prefix_patch.estimate import Setting, estimate, read_data_set, refusal_of
    from hf_prefix_patch.flops import DecoderShape, empty_model
    from hf_prefix_patch.loading import load_tokenizer

    try:
        setting = Setting(
            batch_size=arguments.batch_size,
            max_tokens=arguments.max_tokens,
            max_length=arguments.max_length,
            truncation_mode=arguments.truncation_mode,
            attention=arguments.attention,
            head=arguments.head,
            checkpointing=not arguments.no_checkpointing,
            frozen=not arguments.full,
            reference=not arguments.no_reference,
            seed=arguments.seed,
        )
        if arguments.plot is not None:
            report.check_chart(arguments.plot)  # before the work, if it cannot be made
        config = _config(arguments.model_config, arguments.tokenizer)
        model = None if config is None else empty_model(config)
        shape = None if model is None else DecoderShape.of_model(model)
        refusal = None if model is None else refusal_of(model)
        data = read_data_set(
            arguments.data,
            load_tokenizer(arguments.tokenizer),
            setting.max_length,
            setting.truncation_mode,
            limit=arguments.limit,
            seed=arguments.seed,
        )
        found = estimate(data, setting, shape, refusal)
        with reader_may_leave():
            if arguments.json:
                print(json.dumps(report.as_dict(found), indent=2))
            else:
                print(report.as_text(found))
        if arguments.plot is not None:
            report.draw(found, arguments.plot)
    except (ValueError, TypeError, OSError, ImportError) as error:
        arguments.parser.exit(2, f"{arguments.parser.prog}: error: {with_notes(error)}\n")


def _length(value: str) -> int | None:
    try:
        return None if value == "none" else count(value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or give none for no limit") from None


def _config(given: str | None, tokenizer: str) -> Any:
    """The config asked for; or the one beside the tokenizer, and None where there is none.

    Raises:
        ValueError: it is there, but of no use.
    """
    from hf_prefix_patch.loading import load_config

    if given == "none":
        return None
    try:
        return load_config(given or tokenizer)
    except ValueError as error:
        if given is not None:
            raise
        if not (Path(tokenizer) / "config.json").exists():
            return None
        raise ValueError(
            f"{error}; it stands beside the tokenizer: give another by --model-config, or none to "
            "count tokens alone"
        ) from None
