"""A stock TRL `DPOTrainer` at toy size: tokenizer, preference pairs, models, one training run."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from composites import tiny_composite
from datasets import Dataset
from families import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from trl import DPOConfig, DPOTrainer

from hf_prefix_patch import PrefixSharing, enable_prefix_sharing

SPECIAL_TOKENS = ["<pad>", "<unk>", "<eos>", "<system>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(58)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TIMING = ("_runtime", "_per_second", "step_time")


@dataclass
class Run:
    """What one training run leaves behind."""

    trainer: DPOTrainer
    log: list[dict[str, float]]
    handle: PrefixSharing | None


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with a chat template."""
    vocab = {word: i for i, word in enumerate(SPECIAL_TOKENS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_vision_model(directory: Path) -> str:
    """A LLaVA in fp32 and its processor."""
    processor = tiny_processor()
    words = len(processor.tokenizer)
    model = tiny_composite("llava", vocab_size=words, max_position_embeddings=128)
    model.config.image_token_index = processor.image_token_id
    for part in (model, processor):
        part.save_pretrained(directory)
    return str(directory)


PARTS_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}<eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_processor() -> ProcessorMixin:
    """Of a tiny LLaVA: four tokens for an image of 8 by 8 pixels."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=PARTS_TEMPLATE,
    )


def preference_pairs(pairs: int = 12, seed: int = 0) -> Dataset:
    """Conversations of 28 to 55 tokens with two answers of 4 to 13 tokens.

    Every second pair begins both answers with the same words, every third has answers of one
    length (so that cutting from the front leaves them aligned), and all have one system prompt.
    """
    generator = random.Random(seed)

    def say(role: str, words: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(generator.choices(WORDS, k=words))}

    system = say("system", 6)
    rows = []
    for i in range(pairs):
        prompt = [system, say("user", generator.randint(5, 12)), say("assistant", 3)]
        prompt.append(say("user", generator.randint(4, 18)))
        length = generator.randint(3, 8)
        chosen = say("assistant", length)
        rejected = say("assistant", length if i % 3 == 0 else length + generator.randint(1, 4))
        if i % 2 == 0:
            start = chosen["content"].split()[:2]
            rejected["content"] = " ".join(start + rejected["content"].split()[2:])
        rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return Dataset.from_list(rows)


def save_tiny_model(directory: Path, family: str = "llama", **changes: Any) -> str:
    """Write a tiny model and its tokenizer where TRL can load them from; returns the path."""
    vocab = len(SPECIAL_TOKENS) + len(WORDS)
    model = tiny_model(family, vocab_size=vocab, max_position_embeddings=128, **changes)
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(directory)
    return str(directory)


def lora_config() -> LoraConfig:
    """On the attention layers, which dense models and mixtures of experts have in common."""
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def load(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


def load_moved(path: str) -> PreTrainedModel:
    """With other weights than those in the folder, the same at every call."""
    model = load(path)
    perturb(model, 0.1)
    return model


def dpo_config(output_dir: Path, **options: Any) -> DPOConfig:
    """Three steps of four pairs, everything logged, nothing saved."""
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 2e-3,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    # transformers before 5 leaves the mixed precision of one run to the next.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return DPOConfig(str(output_dir), **(defaults | options))


def add_lora(model: PreTrainedModel, *targets: str) -> PeftModel:
    """The model with adapters that change what it computes, unlike fresh ones."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def perturb(model: nn.Module, scale: float = 0.03) -> None:
    """Move every trainable weight a little, so that the policy is not its own reference."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += scale * noise.to(parameter)


def build_trainer(
    model: nn.Module, output_dir: Path, *, lora: bool = False, ref_model: Any = None, **options: Any
) -> DPOTrainer:
    """A stock trainer; its policy is moved away from the reference after that is in place."""
    torch.manual_seed(0)  # TRL before 0.29 makes its adapter before it sets the seed
    trainer = DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=dpo_config(output_dir, **options),
        train_dataset=preference_pairs(),
        eval_dataset=preference_pairs(8, seed=1),
        processing_class=tiny_tokenizer(),
        peft_config=lora_config() if lora else None,
    )
    perturb(trainer.model)
    return trainer


def run_dpo(
    model: nn.Module,
    output_dir: Path,
    *,
    sharing: Literal["model", "trainer"] | None = None,
    evaluate: bool = False,
    **options: Any,
) -> Run:
    """Train, unpatched or with sharing enabled on the model (before the trainer is built) or on
    the trainer, and keep everything that was logged."""
    handle = enable_prefix_sharing(model) if sharing == "model" else None
    trainer = build_trainer(model, output_dir, **options)
    if sharing == "trainer":
        handle = enable_prefix_sharing(trainer)
    trainer.train()
    if evaluate:
        trainer.evaluate()
    return Run(trainer, trainer.state.log_history, handle)


def assert_same_log(
    got: list[dict[str, float]],
    want: list[dict[str, float]],
    rtol: float = 2e-3,
    but: tuple[str, ...] = (),
) -> None:
    """The same names in the same logs, values equal to `rtol` or 1e-5 absolute; `but` for names
    that end in one of these."""
    assert [log.keys() for log in got] == [log.keys() for log in want]
    for ours, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            if value is None:  # a mean of nothing
                assert ours[name] is None
            elif not name.endswith((*TIMING, *but)):
                torch.testing.assert_close(
                    ours[name], value, rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


def assert_same_reference(got: DPOTrainer, want: DPOTrainer) -> None:
    """The precomputed reference log-probs of both, equal as the values of logs are."""
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        ours, theirs = (torch.tensor(list(t.train_dataset[name])) for t in (got, want))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)
