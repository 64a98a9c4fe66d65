"""DPO with TRL and a LoRA adapter, as one would write it; the line marked below shares prompts.

    python examples/trl_dpo_lora.py                        SmolLM2 and this project's own pairs
    python examples/trl_dpo_lora.py --model PATH --data pairs.jsonl --steps 100

The data is a JSONL file or a folder saved by `datasets`, with the columns prompt, chosen and
rejected: messages or strings.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from peft import LoraConfig
from smollm2 import smollm2_path
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from hf_prefix_patch import PrefixSharing, enable_prefix_sharing

PAIRS = Path(__file__).parent / "data" / "preferences.jsonl"


def train(
    model_path: Path | str,
    data: Path,
    output: Path,
    steps: int = 3,
    pairs_per_batch: int = 2,
    share: bool = True,
    callbacks: list[TrainerCallback] | None = None,
) -> tuple[DPOTrainer, PrefixSharing | None]:
    """Train an adapter and save it to `output`; the unpatched run differs by one line only."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(output),
            per_device_train_batch_size=pairs_per_batch,
            max_steps=steps,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
        ),
        train_dataset=load_pairs(data),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )
    with ExitStack() as stack:
        sharing = stack.enter_context(enable_prefix_sharing(trainer)) if share else None  # <- this
        trainer.train()
    trainer.save_model(str(output))
    return trainer, sharing


def load_pairs(path: Path) -> Dataset:
    """Prompt, chosen and rejected of a JSONL file or of a folder saved by `datasets`."""
    if path.is_dir():
        data = load_from_disk(path)
        data = data["train"] if isinstance(data, DatasetDict) else data
    else:
        data = load_dataset("json", data_files=str(path), split="train")
    return data.select_columns(["prompt", "chosen", "rejected"])


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="folder of a causal LM; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=PAIRS, help="JSONL file or datasets folder")
    parser.add_argument("--output", type=Path, default=Path("build/dpo"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs-per-batch", type=int, default=2)
    return parser


def main() -> None:
    parser = arguments("DPO with TRL and LoRA, prompts shared")
    parser.add_argument("--no-sharing", action="store_true")
    args = parser.parse_args()
    trainer, sharing = train(
        args.model or smollm2_path(),
        args.data,
        args.output,
        args.steps,
        args.pairs_per_batch,
        not args.no_sharing,
    )
    print(f"adapter saved to {args.output}; {sharing.stats if sharing else 'not shared'}")
    trainer.accelerator.end_training()  # leaves the process group, if there is one


if __name__ == "__main__":
    main()
