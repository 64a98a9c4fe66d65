"""Step time of a stock TRL DPO-LoRA run, unpatched against patched, beside the token ratio.

    python benchmarks/trl_step.py --data PATH [--model PATH] [--pairs 2] [--batches 8]

Both run the same batches of the same trainer in turn, so a slow spell of the machine meets both.
The ideal is the ratio of decoder tokens: cells of the padded rows over tokens of the packed row.

Sharing does not touch the LM head. On CUDA, TRL projects completion tokens only; elsewhere it
projects every cell of the rows, which with a small model is a third to a half of a step. The table
therefore comes twice: with TRL's choice for this device, and with completion tokens only, as on
CUDA. Both runs of a table use the same head.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import trl.trainer.utils
from datasets import load_dataset
from peft import LoraConfig
from report import machine, results_folder, write_table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from smollm2 import smollm2_path

from hf_prefix_patch import enable_prefix_sharing

HEADS = {"device": "LM head as TRL runs it here", "completion": "LM head on completion tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--model", help="folder of a causal LM; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a batch")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1, help="times each batch runs")
    parser.add_argument("--max-length", type=int, default=1024, help="TRL's max_length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--unshareable", action="store_true", help="random rows without padding")
    parser.add_argument("--out", type=results_folder, help="folder for the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    trainer = build_trainer(args)
    batches = list(islice(trainer.get_train_dataloader(), args.batches))
    if args.unshareable:
        batches = [unshareable(batch) for batch in batches]
    for head in args.heads:
        with completion_head() if head == "completion" else nullcontext():
            step(trainer, batches[0])  # warm-up
            rows = measure(trainer, batches, args.repeats, HEADS[head])
        kind = "nothing to share" if args.unshareable else Path(args.data).stem
        title = f"TRL DPO-LoRA step, {kind}, {args.pairs} pairs a batch, {HEADS[head]}"
        header = ("batch", "unpatched s", "patched s", "speed-up", "ideal", "loss", "loss error")
        setting = f"{machine()}, {args.threads} threads, fp32"
        write_table(title, (*header, "gradient error"), rows, args.out, setting)


def measure(trainer: DPOTrainer, batches: list[dict], repeats: int, name: str) -> list[tuple]:
    """A line for each batch, and one for their sums."""
    rows = []
    for i, batch in enumerate(tqdm(batches, desc=name)):
        plain = shared = 0.0
        for _ in range(repeats):
            seconds, loss, gradient = step(trainer, batch)
            plain += seconds / repeats
            with enable_prefix_sharing(trainer, verify=False) as sharing:
                seconds, shared_loss, shared_gradient = step(trainer, batch)
            shared += seconds / repeats
        stats = sharing.stats
        ideal = stats.padded_tokens / stats.packed_tokens if stats.calls else 1.0
        error = ((shared_gradient - gradient).norm() / gradient.norm()).item()
        rows.append((i, plain, shared, plain / shared, ideal, loss, abs(shared_loss - loss), error))
    plain, shared = (sum(row[k] for row in rows) for k in (1, 2))
    # The patched time that the token ratio alone would give, batch by batch.
    ideal = plain / sum(row[1] / row[4] for row in rows)
    worst = [max(row[k] for row in rows) for k in (6, 7)]
    return [*rows, ("all", plain, shared, plain / shared, ideal, "", *worst)]


def completion_head() -> Any:
    """While in force, TRL's LM head runs on completion tokens alone ("compact"), as on CUDA."""
    return patch.object(trl.trainer.utils, "_use_triton", lambda device: True)


def step(trainer: DPOTrainer, batch: dict) -> tuple[float, float, torch.Tensor]:
    """Seconds of forward and backward, loss, and all gradients in one vector."""
    trainer.model.zero_grad()
    start = time.perf_counter()
    loss = trainer.training_step(trainer.model, dict(batch)).item()
    seconds = time.perf_counter() - start
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return seconds, loss, torch.cat(gradients)


def build_trainer(args: argparse.Namespace) -> DPOTrainer:
    path = args.model or smollm2_path()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=DPOConfig(
            output_dir="build/trl_step",
            per_device_train_batch_size=args.pairs,
            max_length=args.max_length,
            bf16=False,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train").select_columns(
            ["prompt", "chosen", "rejected"]
        ),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    # A fresh adapter changes nothing, and every loss would be log 2.
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by trainer.train()
    return trainer


def unshareable(batch: dict) -> dict:
    """A batch of the same shape with random tokens and no padding."""
    ids = torch.randint_like(batch["input_ids"], 1000, 40000)
    ids[:, 0] = torch.arange(len(ids)) + 100
    completion = torch.ones_like(ids)
    completion[:, : ids.shape[1] // 2] = 0
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
    }


if __name__ == "__main__":
    main()
