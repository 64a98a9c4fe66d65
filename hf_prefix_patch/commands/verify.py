"""Compare shared with unshared results of a model.

The model is loaded, run on preference pairs without sharing and with it, and the log-probs of its
completions and the gradients of a preference loss are compared. A difference is held against the
model's own rounding noise, measured on the same pairs.

  hf-prefix-patch verify MODEL
  hf-prefix-patch verify MODEL --data pairs.jsonl --pairs 8
  hf-prefix-patch verify MODEL --data pairs.jsonl --dtype bfloat16 --load-in-4bit

Exit code: 0 equal, 1 not equal, 2 bad options, input or too little memory, 3 the model cannot be
shared, 4 nothing was proved (no shared tokens, or too much noise), 5 any other error.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

from hf_prefix_patch.commands.output import reader_may_leave, with_notes
from hf_prefix_patch.options import count, name, seed
from hf_prefix_patch.switch import CHOICES

if TYPE_CHECKING:
    from hf_prefix_patch.comparison import Comparison, Difference

EQUAL, DIFFERENT, BAD_INPUT, REFUSED, UNPROVED, FAILED = range(6)
"""Exit codes; argparse has the third for bad options too."""

_CODES = {"equal": EQUAL, "mismatch": DIFFERENT, "too noisy": UNPROVED}
_SHOWN = 5  # mismatches
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=name, metavar="MODEL", help="folder or name of a causal LM or a reward model")
    add("--data", type=name, metavar="FILE", help="preference pairs; random tokens without")
    add(
        "--pairs",
        type=count,
        default=4,
        metavar="N",
        help="the first N whose prompt leaves room for an answer (default: 4)",
    )
    add("--max-length", type=count, default=512, metavar="N", help="of a row (default: 512)")
    add("--tokenizer", type=name, metavar="T", help="folder or name, if not that of the model")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="auto", type=lambda x: _DTYPES.get(x, x))
    add("--load-in-4bit", action="store_true", help="nf4 weights of bitsandbytes; implies --lora")
    add("--device", help="such as cpu, cuda, cuda:1 or mps (default: a GPU where there is one)")
    add("--attn-implementation", metavar="NAME", help="as transformers takes it")
    add(
        "--adapter",
        type=name,
        metavar="PATH",
        help="PEFT adapter, whose gradients are compared then",
    )
    add("--lora", action="store_true", help="the same with a new LoRA adapter on all layers")
    add("--gradient-checkpointing", action="store_true")
    add("--no-gradients", action="store_true", help="compare results alone, without backward")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add(
        "--backend",
        choices=CHOICES["backend"],
        default="auto",
        metavar="NAME",
        help="attention backend, as of run",
    )
    add("--repeats", type=count, default=3, metavar="N", help="for time (default: 3)")
    add("--seed", type=seed, default=0, help="of random pairs and of --lora")
    add("--json", action="store_true", help="print all figures as JSON")


def main(arguments: argparse.Namespace) -> NoReturn:
    from hf_prefix_patch.loading import is_out_of_memory

    if arguments.tokenizer is not None and arguments.data is None:
        arguments.parser.error("--tokenizer is given, but random tokens need none; give --data too")
    try:
        code = _verify(arguments)
    except Exception as error:
        if is_out_of_memory(error):
            code = _fail(BAD_INPUT, f"out of memory; lower --pairs or --max-length ({error})")
        else:  # whose own exit code would be that of a mismatch
            traceback.print_exc()
            code = FAILED
    sys.exit(code)


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from hf_prefix_patch import DataCollatorWithPrefixSharing
    from hf_prefix_patch.comparison import compare_sharing
    from hf_prefix_patch.features import vocabulary_size
    from hf_prefix_patch.loading import load_config, load_model
    from hf_prefix_patch.patch import enable_prefix_sharing

    torch.manual_seed(arguments.seed)
    try:
        text = load_config(arguments.model, arguments.trust_remote_code).get_text_config()
        positions = getattr(text, "max_position_embeddings", None) or arguments.max_length
        limit = min(arguments.max_length, positions)
        read = None if arguments.data is None else _read_pairs(arguments, limit)
        model: Any = load_model(
            arguments.model,
            dtype=arguments.dtype,
            device=arguments.device,
            load_in_4bit=arguments.load_in_4bit,
            attn_implementation=arguments.attn_implementation,
            adapter=arguments.adapter,
            lora=arguments.lora or (arguments.load_in_4bit and arguments.adapter is None),
            gradient_checkpointing=arguments.gradient_checkpointing,
            trust_remote_code=arguments.trust_remote_code,
        )
    except (OSError, ValueError, TypeError, ImportError) as error:
        return _fail(BAD_INPUT, error)
    config = model.config.get_text_config()
    padding = next((x for x in (config.pad_token_id, config.eos_token_id) if _is_id(x)), 0)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = padding  # classifiers look for the end of a row by it
    try:
        pairs = read or random_pairs(model.config, arguments.pairs, limit, arguments.seed)
        batch = DataCollatorWithPrefixSharing(padding, max_length=limit)(pairs)
    except ValueError as error:
        return _fail(BAD_INPUT, error)
    known, largest = vocabulary_size(model), int(batch["input_ids"].max())
    if known is not None and largest >= known:
        return _fail(
            BAD_INPUT,
            f"the pairs have the token {largest}, but the model knows {known}, counted from 0; "
            "give the tokenizer that belongs to it by --tokenizer",
        )
    tree: Any = batch["input_ids"].prefix_tree
    if tree.packed_tokens == tree.row_tokens:
        return _fail(
            UNPROVED,
            "no two rows of these pairs share a token, so comparing would prove nothing; give "
            "pairs whose chosen and rejected answers belong to one prompt",
        )
    try:
        enable_prefix_sharing(model, backend=arguments.backend).remove()
        found = compare_sharing(
            model,
            batch,
            backend=arguments.backend,
            gradients=not arguments.no_gradients,
            repeats=arguments.repeats,
            progress=sys.stderr.isatty(),
        )
    except NotImplementedError as refusal:
        if not _is_ours(refusal):  # PyTorch has some, whether anything is shared or not
            raise
        return _fail(_code_of_refusal(model, arguments.backend), refusal)
    except ValueError as error:
        return _fail(BAD_INPUT, error)
    except RuntimeError as error:
        if not str(error).startswith("verification of prefix sharing failed"):
            raise
        return _fail(DIFFERENT, error)
    show = _show_json if arguments.json else _show
    with reader_may_leave():
        show(arguments, model, found, batch)
    return _CODES[found.verdict]


def _is_ours(error: Exception) -> bool:
    """Whether this package raised an error."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parents[1])


def _code_of_refusal(model: Any, backend: str) -> int:
    """A backend asked for by name may be what a model cannot be shared with."""
    from hf_prefix_patch.patch import enable_prefix_sharing

    if backend == "auto":
        return REFUSED
    try:
        enable_prefix_sharing(model).remove()
    except NotImplementedError:
        return REFUSED
    return BAD_INPUT


def _read_pairs(arguments: argparse.Namespace, limit: int) -> list[dict[str, Any]]:
    from hf_prefix_patch.loading import load_tokenizer
    from hf_prefix_patch.pair_files import read_pairs
    from hf_prefix_patch.tokenization import encoded, report_cuts

    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model, arguments.trust_remote_code)
    items, pairs, cuts, skipped = read_pairs(Path(arguments.data)), [], [], 0
    for _, record, cut in encoded(items, len(items), tokenizer, progress=sys.stderr.isatty()):
        if len(record["prompt_ids"]) >= limit:
            skipped += 1
            continue
        cuts.append(cut)
        pairs.append(record)
        if len(pairs) == arguments.pairs:
            break
    if not items:
        raise ValueError(
            f"{arguments.data} holds no example, but must hold at least one; check how it is "
            "written"
        )
    if not pairs:
        raise ValueError(
            f"the prompts in {arguments.data} alone fill {limit} tokens, the most of --max-length "
            "and of the model's positions, which leaves nothing of an answer; raise --max-length, "
            "or give pairs with shorter prompts"
        )
    report_cuts(cuts)
    if skipped:
        print(
            f"pairs skipped because their prompt fills {limit} tokens: {skipped}", file=sys.stderr
        )
    return pairs


def random_pairs(
    config: Any, pairs: int, max_length: int, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Preference pairs of random tokens, no special ones among them.

    Prompts take an eighth to a half of `max_length` and answers up to a fourth, both of lengths of
    their own; the second pair has the prompt of the first.

    Raises:
        ValueError: no room for a prompt and an answer.
    """
    import torch

    if max_length < 2:
        raise ValueError(
            f"a row has at most {max_length} token, but needs one of a prompt and one of "
            "an answer; give --max-length 2 or more"
        )
    generator = torch.Generator().manual_seed(seed)
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    named = [x for name, x in values.items() if name.endswith(("token_id", "token_index"))]
    special = {i for x in named for i in (x if isinstance(x, list) else [x])}
    vocab = values["vocab_size"]
    ids = torch.tensor([i for i in range(vocab) if i not in special])

    def draw(least: int, most: int) -> list[int]:
        length = int(torch.randint(max(1, least), max(1, most) + 1, (), generator=generator))
        found: list[int] = ids[torch.randint(len(ids), (length,), generator=generator)].tolist()
        return found

    made: list[dict[str, list[int]]] = []
    for i in range(pairs):
        prompt = made[0]["prompt_ids"] if i == 1 else draw(max_length // 8, max_length // 2)
        chosen, rejected = (draw(max_length // 16, max_length // 4) for _ in range(2))
        made.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return made


def _show_json(arguments: argparse.Namespace, model: Any, found: Comparison, batch: Any) -> None:
    about = {
        "model": arguments.model,
        "data": arguments.data,
        "pairs": len(batch["input_ids"]) // 2,
    }
    shown = _finite(about | {"device": str(model.device)} | found.to_dict())
    print(json.dumps(shown, indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """With None for NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def _show(arguments: argparse.Namespace, model: Any, found: Comparison, batch: Any) -> None:
    from hf_prefix_patch.wrappers import unwrap

    name, source = type(unwrap(model)).__name__, arguments.data or "random tokens"
    print(f"{arguments.model}: {name}, {found.dtype} on {model.device}, backend {found.backend}")
    rows, length = batch["input_ids"].shape
    print(f"{rows // 2} pair{'s' if rows > 2 else ''} of {source}, rows of up to {length} tokens\n")
    print(f"{'':38}{'difference':>12}{'own noise':>12}{'allowed':>12}")
    for label, difference in found.differences.items():
        _row(f"{found.quantity} of {label}", difference)
    if found.worst_gradient is not None:
        name, worst = found.worst_gradient
        usual = sorted(found.gradients.values(), key=lambda x: x.error)[len(found.gradients) // 2]
        _row(f"gradients, median of {len(found.gradients)} tensors", usual)
        _row("gradients, worst tensor", worst)
        print(f"  {name}")
    print()
    print(
        f"tokens: {found.row_tokens} in rows, {found.padded_tokens} with padding, "
        f"{found.packed_tokens} packed: {_ratio(found.padded_tokens, found.packed_tokens)}, "
        f"{_ratio(found.row_tokens, found.packed_tokens)} by sharing alone"
    )
    seconds = [median(x) for x in (found.unshared_seconds, found.shared_seconds)]
    print(f"time:   {seconds[0]:.3g} s unshared, {seconds[1]:.3g} s shared: {_ratio(*seconds)}")
    mebibytes = [x / 2**20 for x in (found.unshared_bytes, found.shared_bytes)]
    kind = "allocated" if model.device.type == "cuda" else "in tensors"
    print(
        f"memory: {_mebibytes(mebibytes[0])} {kind} unshared, {_mebibytes(mebibytes[1])} shared: "
        f"{_ratio(*mebibytes)}\n"
    )
    for line in _conclusion(found):
        print(line)


def _conclusion(found: Comparison) -> Sequence[str]:
    if found.verdict == "mismatch":
        wrong = [
            f"  {name}: {x.error:.1e}, where noise explains {x.allowed:.1e}"
            for name, x in list(found.mismatches.items())[:_SHOWN]
        ]
        rest = len(found.mismatches) - len(wrong)
        more = [f"  and {rest} more"] if rest else []
        return [
            "NOT EQUAL: shared results differ by more than the model's own noise:",
            *wrong,
            *more,
        ]
    if found.verdict == "too noisy":
        return [
            "NOTHING PROVED: the model's own noise is as large as what it computes; take "
            "--dtype float32, or other pairs"
        ]
    lines = []
    if found.unjudged:
        lines = [
            f"{len(found.unjudged)} tensors have gradients that are noise throughout, such as "
            f"{found.unjudged[0]}; of these nothing is said"
        ]
    what = f"{found.quantity} and gradients" if found.gradients else found.quantity
    without = "" if found.gradients else "; gradients were not compared"
    return [*lines, f"equal: {what} differ by no more than the model's own noise{without}"]


def _row(label: str, x: Difference) -> None:
    print(f"{label:38}{x.error:12.1e}{x.noise:12.1e}{x.allowed:12.1e}")


def _mebibytes(value: float) -> str:
    return f"{value:.{0 if value >= 10 else 1}f} MiB"


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}x" if b else "-"


def _fail(code: int, message: object) -> int:
    print(f"hf-prefix-patch verify: {with_notes(message)}", file=sys.stderr)
    return code


def _is_id(x: Any) -> bool:
    return isinstance(x, int) and x >= 0
