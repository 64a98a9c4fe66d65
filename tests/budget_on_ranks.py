"""One epoch of DPO by token budget at learning rate 0; run by `torchrun`, prints what it saw."""

import json
import sys
import warnings
from pathlib import Path

from tiny_trl import build_trainer, load
from torch import distributed

from hf_prefix_patch import enable_prefix_sharing


def main(model: str, output: str, max_tokens: int) -> None:
    warnings.simplefilter("ignore")
    options = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}
    trainer = build_trainer(load(model), Path(output), lora=True, **options)
    handle = enable_prefix_sharing(trainer, max_tokens_per_batch=max_tokens)
    losses, compute_loss = [], trainer.compute_loss

    def noted(*args, **kwargs):
        losses.append(compute_loss(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = noted
    trainer.train()
    log = trainer.state.log_history
    seen = {
        "rank": trainer.args.process_index,
        "row_tokens": handle.stats.row_tokens,
        "batches": len(handle.sampler),
        "steps": trainer.state.global_step,
        "losses": [loss.item() for loss in losses],  # times the weights of their batches
        "margins": [x["rewards/margins"] for x in log if "rewards/margins" in x],
    }
    print("seen", json.dumps(seen), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
