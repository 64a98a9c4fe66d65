"""Two DPO runs whose model is a path, written as if there were no launcher; prints their logs."""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from tiny_trl import dpo_config, perturb, tiny_tokenizer
from torch import distributed
from trl import DPOTrainer


def train(model: str, output: str, **options: object) -> list[dict[str, float]]:
    """Full fine-tuning, four pairs a step on all processes, policy moved from its reference.

    The pairs lie on disk, where processes find each other's precomputed log-probs.
    """
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    options |= {"per_device_train_batch_size": batch, "dataloader_num_workers": 1}
    trainer = DPOTrainer(
        model=model,
        args=dpo_config(Path(output), **options),
        train_dataset=Dataset.from_json(f"{output}/pairs.jsonl", cache_dir=output),
        processing_class=tiny_tokenizer(),
    )
    perturb(trainer.model)
    trainer.train()
    return trainer.state.log_history


def both(model: str, output: str) -> list[list[dict[str, float]]]:
    """With the reference model that the trainer loads, and with its log-probs computed before."""
    return [train(model, output), train(model, output, precompute_ref_log_probs=True)]


if __name__ == "__main__":
    logs = both(*sys.argv[1:])
    if int(os.environ.get("RANK", "0")) == 0:
        print("logs", json.dumps(logs), flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()
