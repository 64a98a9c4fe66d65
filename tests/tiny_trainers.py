"""Any trainer at toy size, run twice: as it is and with prefixes shared."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import trl
from batches import LayerTokens
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from tiny_trl import WORDS, assert_same_log, perturb, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from hf_prefix_patch import PrefixSharing, enable_prefix_sharing

Form = Literal["model", "trainer"]

# Plain gradient descent: what is trained differs by as much as gradients do.
OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 0.2,
    "optim": "sgd",
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
OFF_BY_PADDING = {
    "ORPO": ("logits/chosen", "logits/rejected"),
    "CPO": ("logits/chosen", "logits/rejected"),
    "OnlineDPO": ("kl", "objective/entropy", "non_score_reward", "rlhf_reward"),
}
"""Metrics that average over padded positions, which come back as zeros."""


@dataclass
class Run:
    """What a training run leaves behind; `tokens` are cells that the first layer of the policy saw,
    a call each."""

    trainer: Any
    log: list[dict[str, float]]
    start: dict[str, Tensor]
    trained: dict[str, Tensor]
    handle: PrefixSharing | None
    tokens: list[int]


def from_trl(module: str, name: str) -> Any:
    """A class of a TRL module; skips where this TRL has none."""
    found = pytest.importorskip(module, reason=f"this TRL has no {module}")
    if not hasattr(found, name):
        pytest.skip(f"this TRL has no {name} in {module}")
    return getattr(found, name)


def make_trainer(
    module: str,
    kind: str,
    model: Any,
    output_dir: Path,
    *,
    lora: bool = False,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The trainer `kind` of a TRL module: its own `arguments`, and `options` of its config."""
    config_class = from_trl(module, f"{kind}Config")
    unknown = sorted(options.keys() - config_class.__dataclass_fields__.keys())
    if unknown and Version(trl.__version__) < Version("1.16"):
        pytest.skip(f"{kind}Config of this TRL has no {unknown}")
    config = config_class(str(output_dir), **(OPTIONS | options))
    given = dict(arguments or {})
    if lora:
        given["peft_config"] = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["score"] if hasattr(model, "score") else None,
        )
    return from_trl(module, f"{kind}Trainer")(
        model=model, args=config, processing_class=tiny_tokenizer(), **given
    )


def causal_model(path: str, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, max_position_embeddings=512, **options
    )


def reward_model(path: str) -> PreTrainedModel:
    """A new head on the backbone; always the same one."""
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, max_position_embeddings=512, num_labels=1, pad_token_id=0
    )


def teacher_model(path: str) -> PreTrainedModel:
    model = causal_model(path)
    perturb(model, 0.1)
    return model


def train(
    build: Callable[[Any], Any],
    model: PreTrainedModel,
    sharing: Form | None = None,
    *,
    evaluate: bool = True,
    **options: Any,
) -> Run:
    """Train and evaluate; with sharing enabled on the model before the trainer is built, or on the
    trainer with `options`. The policy is moved away from its reference first."""
    handle = enable_prefix_sharing(model, **options) if sharing == "model" else None
    seen = LayerTokens(model)
    set_seed(0)
    trainer = build(model)
    if sharing == "trainer":
        handle = enable_prefix_sharing(trainer, **options)
    seen.shapes.clear()  # the check at enable time
    perturb(trainer.model)
    start = weights(trainer.model)
    set_seed(1)
    trainer.train()
    if evaluate:
        trainer.evaluate()
    log, trained = trainer.state.log_history, weights(trainer.model)
    tokens = [rows * length for rows, length in seen.shapes]
    return Run(trainer, log, start, trained, handle, tokens)


def weights(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_training(got: Run, want: Run, but: tuple[str, ...] = ()) -> None:
    """Losses within 1e-5, metrics within 1e-5 of their size, weights within fp32 defaults; `but`
    for metrics that end in one of these, some of which differ."""
    losses = [
        [log[n] for log in run.log for n in ("loss", "eval_loss") if n in log]
        for run in (got, want)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    assert_same_log(got.log, want.log, rtol=1e-5, but=but)
    assert not but or any(
        ours[name] != theirs[name]
        for ours, theirs in zip(got.log, want.log, strict=True)
        for name in theirs
        if name.endswith(but)
    )
    torch.testing.assert_close(got.trained, want.trained)
    moved = max((want.trained[n] - x).abs().max().item() for n, x in want.start.items())
    assert moved > 1e-3, "nothing was trained"


def prompts(count: int, words: int, seed: int = 0, uneven: int = 0) -> Dataset:
    """One user turn each of `words` words, every second one of `uneven` fewer; two tokens more with
    the roles' names and one for its end."""
    generator = random.Random(seed)
    turns = [" ".join(generator.choices(WORDS, k=words - uneven * (i % 2))) for i in range(count)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": turn}]} for turn in turns])


def digit_sum(completion_ids: list[list[int]], **rest: Any) -> list[float]:
    """A reward that tells completions apart."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def fixed_completions(trainer: Any, lengths: tuple[int, int], end: bool = True) -> None:
    """In place of generation: completions drawn by a generator of their own, `lengths` from and to,
    every second one with an end or all."""
    generator = random.Random(5)
    vocabulary, eos = range(6, 6 + len(WORDS)), trainer.processing_class.eos_token_id

    def generate(prompt_ids: list[list[int]], *rest: Any, **more: Any) -> Any:
        drawn = [generator.choices(vocabulary, k=generator.randint(*lengths)) for _ in prompt_ids]
        ended = [[*x[:-1], eos] if end or i % 2 else x for i, x in enumerate(drawn)]
        return ended if "RLOO" in type(trainer).__name__ else (ended, None)

    trainer._generate_single_turn = generate
