"""The TRL script of trl_dpo_lora.py with batches by token budget; the line marked below sizes them.

    python examples/trl_packed.py                          SmolLM2 and this project's own pairs
    python examples/trl_packed.py --model PATH --data pairs.jsonl --max-tokens 8192

A batch takes pairs that share text together, until the tokens that the decoder has to run on reach
the budget. `--pairs-per-batch` stays what the stock script has; the line takes its place, so it is
only what the number of batches is compared with.
"""

from pathlib import Path

import torch
from peft import LoraConfig
from smollm2 import smollm2_path
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl_dpo_lora import arguments, load_pairs

from hf_prefix_patch import PrefixSharing, enable_prefix_sharing


def train(
    model_path: Path | str,
    data: Path,
    output: Path,
    steps: int,
    pairs_per_batch: int,
    max_tokens: int,
) -> tuple[DPOTrainer, PrefixSharing]:
    """Train an adapter and save it to `output`."""
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
    )
    with enable_prefix_sharing(trainer, max_tokens_per_batch=max_tokens) as sharing:  # <- this
        trainer.train()
    trainer.save_model(str(output))
    return trainer, sharing


def main() -> None:
    parser = arguments("DPO with TRL and LoRA, prompts shared, batches by token budget")
    # Two rows of the longest that TRL cuts to by default: no pair is too large for the budget.
    parser.add_argument("--max-tokens", type=int, default=2048, help="unique tokens in a batch")
    args = parser.parse_args()
    model_path = args.model or smollm2_path()
    trainer, sharing = train(
        model_path, args.data, args.output, args.steps, args.pairs_per_batch, args.max_tokens
    )
    fixed = -(-len(trainer.train_dataset) // args.pairs_per_batch)
    print(
        f"batches per epoch: {len(sharing.sampler)}, {fixed} without the budget\n"
        f"pairs per batch: {sharing.sampler.pairs_per_batch:.1f} on average, "
        f"{args.pairs_per_batch} without\n"
        f"adapter saved to {args.output}; {sharing.stats}"
    )
    trainer.accelerator.end_training()  # leaves the process group, if there is one


if __name__ == "__main__":
    main()
