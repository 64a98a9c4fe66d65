"""Step time of a stock TRL DPO-LoRA run, unpatched against patched, beside the token ratio.

    python benchmarks/trl_step.py --data PATH [--model PATH] [--pairs 2] [--batches 8]

Both run the same batches of the same trainer in turn, so a slow spell of the machine meets both.
The ideal is the ratio of decoder tokens: cells of the padded rows over tokens of the packed row.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from report import machine, write_table
from smollm2 import smollm2_path

from hf_prefix_patch import enable_prefix_sharing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--model", help="folder of a causal LM; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a batch")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024, help="TRL's max_length")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--same-lengths", action="store_true", help="nothing to share, no padding")
    parser.add_argument("--out", type=Path, help="folder for the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    trainer = build_trainer(args)
    loader = iter(trainer.get_train_dataloader())
    model = trainer.model
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by trainer.train()
    batches = [next(loader) for _ in range(args.batches)]
    if args.same_lengths:
        batches = [unshareable(batch) for batch in batches]

    def step(batch: dict) -> tuple[float, float]:
        model.zero_grad()
        start = time.perf_counter()
        loss = trainer.training_step(model, dict(batch))
        return time.perf_counter() - start, loss.item()

    rows = []
    for i, batch in enumerate(tqdm([batches[0], *batches], desc="steps")):
        plain, loss = step(batch)
        with enable_prefix_sharing(model, verify=False) as sharing:
            shared, shared_loss = step(batch)
        if i == 0:  # warm-up
            continue
        stats = sharing.stats
        ideal = stats.padded_tokens / stats.packed_tokens if stats.calls else 1.0
        rows.append((i, plain, shared, plain / shared, ideal, abs(loss - shared_loss)))
    total = [sum(row[k] for row in rows) for k in (1, 2)]
    ideal = total[0] / sum(row[1] / row[4] for row in rows)
    rows.append(("all", *total, total[0] / total[1], ideal, max(row[5] for row in rows)))
    header = ("batch", "unpatched s", "patched s", "speed-up", "ideal", "loss difference")
    title = f"TRL DPO-LoRA step, {Path(args.data).stem}, {args.pairs} pairs a batch"
    write_table(title, header, rows, args.out, f"{machine()}, {args.threads} threads, fp32")


def build_trainer(args: argparse.Namespace) -> DPOTrainer:
    path = args.model or smollm2_path()
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=DPOConfig(
            output_dir="/tmp/hf_prefix_patch",
            per_device_train_batch_size=args.pairs,
            max_length=args.max_length,
            gradient_checkpointing=not args.no_checkpointing,
            bf16=False,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train").select_columns(
            ["prompt", "chosen", "rejected"]
        ),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )


def unshareable(batch: dict) -> dict:
    """The batch with random tokens and no padding: there is nothing to share in it."""
    ids = torch.randint_like(batch["input_ids"], 1000, 40000)
    ids[:, 0] = torch.arange(len(ids)) + 100
    ones = torch.ones_like(ids)
    completion = ones.clone()
    completion[:, : ids.shape[1] // 2] = 0
    return {"input_ids": ids, "attention_mask": ones, "completion_mask": completion}


if __name__ == "__main__":
    main()
