"""DPO with a LoRA adapter in plain PyTorch: what the pairs of a batch share is computed once.

    python examples/plain_pytorch_dpo.py                   SmolLM2 and this project's own pairs
    python examples/plain_pytorch_dpo.py --model PATH --data pairs.jsonl --epochs 3

An example of the data has prompt, chosen and rejected: messages or strings.
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from smollm2 import smollm2_path
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharingBatchSampler,
    completion_logps,
    enable_prefix_sharing,
    tokenize_preferences,
)

PAIRS = Path(__file__).parent / "data" / "preferences.jsonl"


def dpo_loss(model, batch, beta):
    """Loss of each pair, `[B]`: arXiv 2305.18290, equation 7; reference: without the adapter."""
    with torch.no_grad(), model.disable_adapter():
        reference = completion_logps(model, batch)
    chosen, rejected = (completion_logps(model, batch) - reference).chunk(2)
    return -logsigmoid(beta * (chosen - rejected))


def train(path, data, output, max_tokens, epochs, steps, lr, beta):
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    pairs = tokenize_preferences(data, AutoTokenizer.from_pretrained(path))
    sampler = PrefixSharingBatchSampler(pairs, max_tokens)
    collator = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")  # nothing is padded
    loader = DataLoader(pairs, batch_sampler=sampler, collate_fn=collator, num_workers=1)
    steps = steps or epochs * len(loader)
    batches = islice(chain.from_iterable(repeat(loader)), steps)  # each round is another epoch
    with enable_prefix_sharing(model) as sharing, tqdm(batches, "DPO", steps) as progress:
        for batch in progress:
            with torch.autocast(device, torch.bfloat16, enabled=cuda):
                losses = dpo_loss(model, batch.to(device), beta)
            # Not their mean: a pair would weigh more, the fewer it is with in its batch.
            (losses.sum() / sampler.pairs_per_batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            ratio = sharing.stats.sharing_ratio
            progress.set_postfix_str(f"loss {losses.mean():.4f}, sharing ratio {ratio:.2f}")
    model.save_pretrained(output)
    print(f"adapter saved to {output}; {sharing.stats}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="DPO with LoRA in plain PyTorch, prompts shared")
    parser.add_argument("--model", help="folder of a causal LM; default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=PAIRS, help="JSONL file or datasets folder")
    parser.add_argument("--output", type=Path, default=Path("build/dpo"))
    parser.add_argument("--max-tokens", type=int, default=2048, help="unique tokens in a batch")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="batches to train on, instead of whole epochs")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    options = vars(parser.parse_args())
    train(options.pop("model") or smollm2_path(), **options)
