"""A pass of DPO with LoRA over the same pairs: stock TRL, TRL shared, and the plain loop.

    python benchmarks/training.py --data PATH ... [--model PATH] [--pairs-in-all 16] [--out FOLDER]

Every run has a process of its own, so that its peak memory is its own: on CUDA what the allocator
handed out at most, elsewhere (Linux) resident memory, both beyond what there was before the pass.
Timed is the pass, with data loading and optimizer steps; loading, tokenising and a warm-up on one
pair come before it. The learning rate is 0, so that all runs compute the same losses, which is
checked.

The ideal is the ratio of decoder tokens: cells of the rows in TRL's first batch size, over the
tokens that the decoder ran on. Sharing does not touch TRL's LM head, which projects completion
tokens on CUDA but every cell of the rows elsewhere; the plain loop projects completion tokens
everywhere, and may pass its ideal. With `--completion-head` TRL does so everywhere too.
"""

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from math import nan
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from charts import grouped_bars
from datasets import Dataset, load_dataset
from pairs import load_tokenizer
from peft import LoraConfig, get_peft_model
from report import machine, results_folder, write_table
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl_step import completion_head

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from plain_pytorch_dpo import dpo_loss

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharingBatchSampler,
    enable_prefix_sharing,
    tokenize_preferences,
)
from hf_prefix_patch.measuring import peak_of, seconds_of
from hf_prefix_patch.versions import CHECKPOINT_LAYERS

HEADER = ("set", "run", "batches", "pairs/s", "speed-up", "ideal", "decoder tokens", "peak GiB")
HEADER += ("mean loss",)
COLUMNS = ["prompt", "chosen", "rejected"]
BETA = 0.1
# Between the mean losses of two runs. In bf16 a log-prob of many tokens is rounded much more.
SAME_LOSS = {"cpu": 1e-4, "cuda": 2e-2}


class Run(NamedTuple):
    """One way to train: in batches of so many pairs, or of so many unique tokens."""

    name: str
    pairs: int = 1
    max_tokens: int | None = None
    shared: bool = True
    trainer: bool = True


class Result(NamedTuple):
    """Of a pass; `tokens` that the decoder of the policy ran on, `peak` in bytes."""

    batches: int
    loss: float
    seconds: float
    tokens: int
    peak: float


Prepared = tuple[nn.Module, Callable[[], Any], Callable[[], tuple[int, float]]]
"""A model, what warms it up, and a pass that returns its number of batches and mean loss."""


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    tokenizer = load_tokenizer(args.model)
    args.model = tokenizer.name_or_path  # SmolLM2's, if none was given
    table: list[tuple] = []
    for path in args.data:
        examples = select(path, tokenizer, args)
        results = {}
        for run in tqdm(runs(args), desc=path.stem):
            results[run.name] = in_own_process(measure, run, examples, args)
            tqdm.write(f"{path.stem}, {run.name}: {results[run.name]}")  # a long run may end early
        check_losses(path.stem, results, args.device)
        table += lines(path.stem, results, len(examples))
    title = f"Training with DPO and LoRA, {Path(args.model).name} on {args.device}"
    title += "" if args.checkpointing else ", no checkpointing"
    title += ", TRL's head on completion tokens" if args.completion_head else ""
    precision = "fp32" if args.device == "cpu" else "bf16 autocast"
    note = f"{machine(args.device)}, {args.threads} threads, {precision}, LoRA r=8 on all linear "
    note += f"layers, checkpointing {'on' if args.checkpointing else 'off'}, "
    note += f"{args.pairs_in_all} pairs, at most {args.max_length} tokens a row"
    write_table(title, HEADER, table, args.out, note, lambda figure: draw(figure, table))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--data", type=Path, nargs="+", required=True, help="JSONL: prompt, chosen, rejected")
    add("--model", help="folder of a causal LM; SmolLM2-135M-Instruct if not given")
    add("--pairs-in-all", type=int, default=16, help="pairs of a pass")
    add("--batches", type=int, nargs="+", default=[2, 8], help="TRL's batch sizes, in pairs")
    add("--max-tokens", type=int, default=2048, help="budget of unique tokens")
    add("--max-length", type=int, default=1024, help="TRL's max_length")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="as TRL's")
    add("--completion-head", action="store_true", help="TRL's LM head as on CUDA")
    add("--device", default=device, choices=["cpu", "cuda"])
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--out", type=results_folder, help="folder for table and chart")
    return parser


def select(path: Path, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs of a file in random order: their text for TRL, their ids for the plain loop.

    Raises:
        ValueError: too few pairs, or a number of them that batches do not divide.
    """
    count = args.pairs_in_all
    if any(count % pairs for pairs in args.batches):
        raise ValueError(
            f"--pairs-in-all is {count}, but must be a multiple of --batches {args.batches}: TRL's "
            "mean loss is one of batches, and a smaller last one would weigh as much"
        )
    data = load_dataset("json", data_files=str(path), split="train").select_columns(COLUMNS)
    data = tokenize_preferences(data.shuffle(seed=0), tokenizer, max_length=args.max_length)
    if len(data) < count:
        raise ValueError(
            f"{path} has {len(data)} pairs with a prompt below {args.max_length} tokens, but "
            f"--pairs-in-all is {count}; lower it or raise --max-length"
        )
    return data.select(range(count)).to_list()


def runs(args: argparse.Namespace) -> list[Run]:
    """The runs of a set, the first of which the others are held against."""
    budget = f"{args.max_tokens} tokens"
    return [
        *(Run(f"TRL, {n} pairs", n, shared=False) for n in args.batches),
        *(Run(f"TRL shared, {n} pairs", n) for n in args.batches),
        Run(f"TRL shared, {budget}", max_tokens=args.max_tokens),
        Run(f"plain loop, {budget}", max_tokens=args.max_tokens, trainer=False),
    ]


def in_own_process(call: Callable[..., Any], *args: Any) -> Any:
    """What the call returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def measure(run: Run, examples: list[dict[str, Any]], args: argparse.Namespace) -> Result:
    torch.set_num_threads(args.threads)
    prepare = with_trainer if run.trainer else with_plain_loop
    model, warm_up, train = prepare(run, examples, args)
    randomise_adapter(model)
    seconds, outcome = [], []

    def timed() -> None:
        seconds.append(seconds_of(lambda: outcome.append(train()), model.device))

    with completion_head() if args.completion_head else nullcontext():
        warm_up()
        model.zero_grad()
        tokens = count_tokens(model)
        peak = peak_of(timed, model.device) if args.device == "cuda" else peak_resident(timed)
    return Result(*outcome[0], seconds[0], sum(tokens), peak)


def with_trainer(run: Run, examples: list[dict[str, Any]], args: argparse.Namespace) -> Prepared:
    """TRL's trainer as a script would set it up; it reads the text."""
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=DPOConfig(
            output_dir="build/training",
            per_device_train_batch_size=run.pairs,
            num_train_epochs=1,
            learning_rate=0.0,
            beta=BETA,
            max_length=args.max_length,
            gradient_checkpointing=args.checkpointing,
            bf16=args.device == "cuda",
            use_cpu=args.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(examples).select_columns(COLUMNS),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=lora_config(),
    )
    trainer.remove_callback(PrinterCallback)
    if run.shared:
        enable_prefix_sharing(trainer, max_tokens_per_batch=run.max_tokens)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by trainer.train()

    def warm_up() -> None:
        batch = trainer.data_collator([trainer.train_dataset[0]])
        with trainer.accelerator.autocast():  # put around the model by trainer.train()
            trainer.training_step(trainer.model, batch)

    losses, compute_loss = [], trainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(*args, **kwargs)
        losses.append(loss.detach())  # times the weight of the batch, which is not logged
        return loss

    def train() -> tuple[int, float]:
        trainer.compute_loss = noted
        trainer.train()
        return trainer.state.global_step, torch.stack(losses).mean().item()

    return trainer.model, warm_up, train


def with_plain_loop(run: Run, examples: list[dict[str, Any]], args: argparse.Namespace) -> Prepared:
    """What TRL's trainer does in a step, in a few lines; it reads the ids."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    model = get_peft_model(model, lora_config()).train()
    if args.checkpointing:
        getattr(model, CHECKPOINT_LAYERS)({"use_reentrant": False})
        model.enable_input_require_grads()
    enable_prefix_sharing(model)
    sampler = PrefixSharingBatchSampler(examples, run.max_tokens, max_length=args.max_length)
    collator = DataCollatorWithPrefixSharing(0, max_length=args.max_length, layout="packed")
    loader = DataLoader(examples, batch_sampler=sampler, collate_fn=collator)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(batch: Any) -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = dpo_loss(model, batch.to(args.device), BETA).sum() / sampler.pairs_per_batch
        loss.backward()
        return loss.detach()

    def train() -> tuple[int, float]:
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        losses = torch.zeros((), device=args.device)
        for batch in loader:
            losses += step(batch)
            nn.utils.clip_grad_norm_(trained, 1.0)  # TRL's default
            optimizer.step()
            optimizer.zero_grad()
        return len(loader), losses.item() / len(loader)

    return model, lambda: step(collator(examples[:1])), train


def count_tokens(model: nn.Module) -> list[int]:
    """Of each call of the decoder from now on, but those of the reference."""
    tokens: list[int] = []

    def count(embeddings: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            tokens.append(inputs[0].numel())

    model.get_input_embeddings().register_forward_pre_hook(count)
    return tokens


def lora_config() -> LoraConfig:
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def randomise_adapter(model: nn.Module) -> None:
    """The same adapter in every run; a fresh one changes nothing, and every loss would be log 2."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def peak_resident(call: Callable[[], Any]) -> float:
    """Most bytes of resident memory during a call, beyond what there was before it."""
    proc = Path("/proc/self")
    if not (proc / "clear_refs").exists():
        call()
        return nan

    def resident(name: str) -> int:
        line = next(x for x in (proc / "status").read_text().splitlines() if x.startswith(name))
        return 1024 * int(line.split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, but would count as there before
    (proc / "clear_refs").write_text("5")  # sets the peak to what is there now
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def check_losses(name: str, results: dict[str, Result], device: str) -> None:
    """Raise a RuntimeError if two runs did not compute the same losses."""
    first, *others = (result.loss for result in results.values())
    if not all(abs(loss - first) <= SAME_LOSS[device] for loss in others):
        found = ", ".join(f"{run} {result.loss:.6f}" for run, result in results.items())
        raise RuntimeError(f"{name}: the mean losses differ by more than rounding: {found}")


def lines(name: str, results: dict[str, Result], pairs: int) -> Iterator[tuple]:
    first = next(iter(results.values()))
    for run, x in results.items():
        ratios = first.seconds / x.seconds, first.tokens / x.tokens
        rate = pairs / x.seconds
        yield name, run, x.batches, rate, *ratios, x.tokens, x.peak / 2**30, f"{x.loss:.6f}"


def draw(figure: Any, table: list[tuple]) -> None:
    """Bars of pairs per second, for every set."""
    sets = list(dict.fromkeys(row[0] for row in table))
    bars: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        rate, speed_up, ideal = row[3:6]
        bars.setdefault(row[1], []).append((rate, rate / speed_up * ideal))
    grouped_bars(figure, sets, bars, "pairs per second", unit=None)


if __name__ == "__main__":
    main()
