"""Whether a whole training run ends where the unshared one does.

    python benchmarks/equivalence.py --data PATH [--model PATH] [--steps 60] [--out FOLDER]

DPO with LoRA in stock TRL, several times from the same seed over the same pairs in the same order:
unshared; shared; and unshared again with every batch padded to a multiple of so many columns, which
changes nothing but how sums are rounded. Optimizers let rounding grow from step to step, so two
runs are never the same for long. The last run says what is to be expected; a shared run, whose sums
have another order altogether, should be about as far from the unshared one, and losses no further
apart. One more shared run, over the pairs in another order, shows
how far apart runs are that do differ.

The distance of two adapters is the norm of the difference of their parameters over the norm of
what the unshared run has changed in them so far.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from pairs import load_tokenizer
from report import machine, results_folder, write_table
from torch import Tensor, nn
from training import COLUMNS, count_tokens, in_own_process, lora_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl_step import completion_head

from hf_prefix_patch import enable_prefix_sharing, tokenize_preferences

SAME_PAIRS = ("shared", "unshared, more padding")
OTHER_ORDER = "shared, other order"


class Run(NamedTuple):
    name: str
    shared: bool = False
    multiple: int | None = None  # of columns, that batches are padded to
    data_seed: int = 0


class Result(NamedTuple):
    """Of a run; `adapters` has the trained parameters in one vector, by steps done."""

    losses: list[float]
    tokens: int  # that the policy's decoder ran on
    adapters: dict[int, Tensor]


class Line(NamedTuple):
    """Of the table, for a run."""

    run: str
    tokens: int
    first: float
    last: float
    loss_difference: float
    distance: float


HEADER = ("run", "decoder tokens", "loss, first 10", "loss, last 10", "largest loss difference")
HEADER += ("adapter distance",)


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    tokenizer = load_tokenizer(args.model)
    args.model = tokenizer.name_or_path  # SmolLM2's, if none was given
    examples = select(tokenizer, args)
    results = {}
    for run in runs(args):
        results[run.name] = in_own_process(train, run, examples, args)
        losses = results[run.name].losses
        print(f"{run.name}: loss {losses[0]:.4f} to {losses[-1]:.4f}", file=sys.stderr, flush=True)
    title = f"{args.steps} steps of DPO with LoRA, {Path(args.model).name}, {args.data.stem}"
    note = (
        f"{machine('cpu')}, {args.threads} threads, fp32, {args.pairs} pairs a batch, rows of at "
    )
    note += f"most {args.max_length} tokens, learning rate {args.learning_rate:g}, LoRA r=8 on all "
    note += f"linear layers; more padding: to a multiple of {args.multiple} columns"
    table = [line(name, results) for name in results]
    write_table(title, HEADER, table, args.out, note, lambda figure: draw(figure, results))
    write_table(f"{title}, step by step", *by_step(results), args.out, note)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSONL: prompt, chosen, rejected")
    add("--model", help="folder of a causal LM; SmolLM2-135M-Instruct if not given")
    add("--steps", type=int, default=60)
    add("--pairs", type=int, default=2, help="pairs in a batch")
    add("--max-length", type=int, default=256, help="pairs with a longer row are left out")
    add("--multiple", type=int, default=64, help="of columns, in the run with more padding")
    add("--learning-rate", type=float, default=1e-4)
    add("--every", type=int, default=5, help="steps between two looks at the adapter")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=results_folder, help="folder for tables and chart")
    return parser


def runs(args: argparse.Namespace) -> list[Run]:
    shared, padded = SAME_PAIRS
    return [
        Run("unshared"),
        Run(shared, shared=True),
        Run(padded, multiple=args.multiple),
        Run(OTHER_ORDER, shared=True, data_seed=1),
    ]


def select(tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """As many pairs as the steps need, in random order, none with a row that would be cut.

    Raises:
        ValueError: the file has fewer.
    """
    data = Dataset.from_json(str(args.data)).select_columns(COLUMNS).shuffle(seed=0)
    count, pairs = args.steps * args.pairs, []
    for start in range(0, len(data), count):
        some = data.select(range(start, min(start + count, len(data))))
        for pair in tokenize_preferences(some, tokenizer, progress=False):
            answer = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
            if len(pair["prompt_ids"]) + answer <= args.max_length:
                pairs.append({name: pair[name] for name in COLUMNS})
        if len(pairs) >= count:
            return pairs[:count]
    raise ValueError(
        f"{args.data} has {len(pairs)} pairs with rows of at most {args.max_length} tokens, but "
        f"{args.steps} steps take {count}; raise --max-length or lower --steps or --pairs"
    )


class Watch(TrainerCallback):
    """Loss of each step, and the trained parameters every so many."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.losses: list[float] = []
        self.adapters: dict[int, Tensor] = {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.adapters[0] = trained(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.adapters[state.global_step] = trained(model)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def trained(model: nn.Module) -> Tensor:
    """The parameters that are trained, in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def train(run: Run, examples: list[dict[str, Any]], args: argparse.Namespace) -> Result:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)  # of a fresh adapter
    watch = Watch(args.every)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=DPOConfig(
            output_dir="build/equivalence",
            per_device_train_batch_size=args.pairs,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            max_length=args.max_length,
            pad_to_multiple_of=run.multiple,
            data_seed=run.data_seed,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=lora_config(),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    sharing = enable_prefix_sharing(trainer, on_bypass="raise") if run.shared else None
    tokens = count_tokens(trainer.model)
    with completion_head():  # most of a step would be the head otherwise
        trainer.train()
    if sharing is not None and sharing.stats.calls < 2 * args.steps:
        raise RuntimeError(f"{run.name}: {sharing.stats}, but every call should have been shared")
    return Result(watch.losses, sum(tokens), watch.adapters)


def line(name: str, results: dict[str, Result]) -> Line:
    losses = results[name].losses
    some = min(10, len(losses))
    first, last = sum(losses[:some]) / some, sum(losses[-some:]) / some
    worst = max(loss_differences(results, name))
    distance = list(distances(results, name).values())[-1]
    return Line(name, results[name].tokens, first, last, worst, distance)


def loss_differences(results: dict[str, Result], name: str) -> list[float]:
    pairs = zip(results[name].losses, results["unshared"].losses, strict=True)
    return [abs(a - b) for a, b in pairs]


def distances(results: dict[str, Result], name: str) -> dict[int, float]:
    """From the unshared run's adapter, by steps done.

    Raises:
        RuntimeError: the runs did not begin with the same adapter.
    """
    adapters, unshared = results[name].adapters, results["unshared"].adapters
    if not adapters[0].equal(unshared[0]):
        raise RuntimeError(f"{name} begins with another adapter than the unshared run")
    return {
        step: ((adapters[step] - there).norm() / (there - unshared[0]).norm()).item()
        for step, there in unshared.items()
        if step
    }


def by_step(results: dict[str, Result]) -> tuple[tuple[str, ...], list[tuple]]:
    """Header and lines of the losses, and of the distances where adapters were kept."""
    others = [name for name in results if name != "unshared"]
    apart = {name: distances(results, name) for name in others}
    header = ("step", *results, *(f"{name}: adapter distance" for name in others))
    steps = range(len(results["unshared"].losses))
    return header, [
        (
            i + 1,
            *(f"{result.losses[i]:.6f}" for result in results.values()),
            *(apart[name].get(i + 1, "") for name in others),
        )
        for i in steps
    ]


def draw(figure: Any, results: dict[str, Result]) -> None:
    """Losses of all runs; how far their losses and adapters are from those of the unshared one."""
    figure.set_size_inches(12, 3.8)
    left, middle, right = figure.subplots(1, 3)
    styles = {"unshared": {"linewidth": 4, "alpha": 0.35}, SAME_PAIRS[0]: {}, SAME_PAIRS[1]: {}}
    styles[SAME_PAIRS[1]]["linestyle"] = "--"
    for name, style in styles.items():
        left.plot(
            range(1, len(results[name].losses) + 1), results[name].losses, label=name, **style
        )
    left.set(title="DPO loss", xlabel="step")
    left.legend(frameon=False)
    for colour, name in enumerate((*SAME_PAIRS, OTHER_ORDER), start=1):
        look = {"color": f"C{colour}", "label": name}
        if name != OTHER_ORDER:  # of other pairs
            apart = [max(x, 1e-9) for x in loss_differences(results, name)]
            middle.semilogy(range(1, len(apart) + 1), apart, **look)
        right.semilogy(*zip(*distances(results, name).items(), strict=True), "o-", **look)
    middle.set(title="loss: difference from the unshared run", xlabel="step")
    middle.legend(frameon=False)
    right.set(title="adapter: distance from the unshared run's", xlabel="step")
    right.legend(frameon=False)


if __name__ == "__main__":
    main()
