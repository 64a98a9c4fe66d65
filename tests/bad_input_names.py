"""What the code of bad inputs names: models, batches, trainers, made when a case asks for them."""

from __future__ import annotations

import json
import os
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from batches import preference_batch
from composites import tiny_composite
from families import sizes, tiny_model
from peft import LoraConfig, PolyConfig, PromptTuningConfig, get_peft_model
from tiny_trl import build_trainer, save_tiny_model, tiny_processor, tiny_tokenizer
from tiny_types import tiny_model_of
from torch import nn

import hf_prefix_patch
from hf_prefix_patch import cli
from hf_prefix_patch.program import run_file
from hf_prefix_patch.switch import LaunchOptions

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10], "rejected_ids": [9, 11, 12]},
    {"prompt_ids": [5, 6, 12], "chosen_ids": [13], "rejected_ids": [14, 15, 16, 17]},
]


def _of_config(name: str, **config: Any) -> Any:
    made = getattr(transformers, f"{name.partition('For')[0].removesuffix('Model')}Config")
    return getattr(transformers, name)(made(**config))


def _bert() -> Any:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return _of_config("BertModel", vocab_size=40, intermediate_size=16, **small)


def _t5() -> Any:
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return _of_config("T5ForConditionalGeneration", vocab_size=40, **small)


def _changed(change: Callable[[Any], Any]) -> Any:
    model = tiny_model()
    change(model)
    return model


def _unsloth(model: Any) -> None:
    code = (lambda self, x: x).__code__
    forward = types.FunctionType(code, {"__name__": "unsloth.models.llama"}, "fast_forward")
    attention = model.model.layers[0].self_attn
    attention.forward = types.MethodType(forward, attention)


def _by_frequency(model: transformers.PreTrainedModel) -> None:
    model.get_input_embeddings().scale_grad_by_freq = True


def _noise(model: Any) -> None:
    model.get_input_embeddings().neftune_noise_alpha = 5.0


def _leak(model: Any) -> None:
    """Something beside attention looks across the tokens of a row."""
    model.model.norm.register_forward_hook(lambda norm, args, out: out + out.roll(1, 1))


def _with_adapter(config: Any) -> Any:
    return get_peft_model(tiny_model(), config)


class OfBatches(nn.Module):
    """A wrapper that is called with a batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Any:
        return self.module(**batch)


def _packed() -> Any:
    return hf_prefix_patch.DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")(PAIRS)


def _without_plan() -> Any:
    batch = _packed()
    batch["input_ids"] = batch["input_ids"].clone()
    return batch


def _trainer(**options: Any) -> Any:
    folder = tempfile.mkdtemp(dir=os.getcwd())
    model = tiny_model(vocab_size=64, max_position_embeddings=128)
    return build_trainer(model, Path(folder), lora=True, **options)


def _write(name: str, text: str | bytes) -> None:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _model_folder() -> str:
    """A folder `model` with a tiny model and its tokenizer, and `pairs.jsonl` beside it."""
    save_tiny_model(Path("model"))
    pair = {"prompt": "w1 w2 ", "chosen": "w3", "rejected": "w4 w5"}
    Path("pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 4)
    return "model"


def _empty_folder() -> str:
    Path("empty").mkdir()
    return "empty"


def _tokenizer(**changes: Any) -> Any:
    tokenizer = tiny_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


NAMES: dict[str, Callable[[], Any]] = {
    **{name: lambda n=name: getattr(hf_prefix_patch, n) for name in hf_prefix_patch.__all__},
    "torch": lambda: torch,
    "np": lambda: np,
    # Models.
    "model": tiny_model,
    "encoder": _bert,
    "encoder_decoder": _t5,
    "bloom": lambda: tiny_model_of("bloom"),
    "mamba": lambda: _of_config(
        "MambaForCausalLM", vocab_size=40, hidden_size=16, num_hidden_layers=1
    ),
    "chunked": lambda: tiny_model(layer_types=["chunked_attention", "full_attention"]),
    "bidirectional": lambda: tiny_model("gemma3", use_bidirectional_attention=True),
    "opt": lambda: tiny_model_of("opt"),
    "roberta": lambda: transformers.RobertaForCausalLM(
        transformers.RobertaConfig(
            **{**sizes(), "num_hidden_layers": 1, "pad_token_id": 1}, is_decoder=True
        )
    ),
    "encodec": lambda: transformers.EncodecModel(
        transformers.EncodecConfig(num_filters=4, hidden_size=8)
    ),
    "from_unsloth": lambda: _changed(_unsloth),
    "pooled": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**sizes(), "num_hidden_layers": 1}, is_decoder=True)
    ),
    "by_frequency": lambda: _changed(_by_frequency),
    "noisy": lambda: _changed(_noise),
    "across_tokens": lambda: _changed(_leak),
    "with_prompt_tuning": lambda: _with_adapter(
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    "with_poly": lambda: _with_adapter(
        PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], n_tasks=2, n_skills=2)
    ),
    "with_alora": lambda: _with_adapter(
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    ),
    "gemma3": lambda: tiny_composite("gemma3"),
    "vision_language": lambda: tiny_composite("qwen2.5-vl"),
    "classifier": lambda: transformers.LlamaForSequenceClassification(tiny_model().config),
    "gpt2": lambda: tiny_model_of("gpt2", n_positions=24),
    "OfBatches": lambda: OfBatches,
    "meta_model": lambda: tiny_model().to("meta"),
    # Batches.
    "rows": lambda: preference_batch().inputs,
    "ids": lambda: preference_batch().input_ids,
    "mask": lambda: preference_batch().attention_mask,
    "pairs": lambda: PAIRS,
    "packed": _packed,
    "without_plan": _without_plan,
    "tree": lambda: hf_prefix_patch.PrefixTree.from_rows([[1, 2, 3], [1, 2, 4]]),
    # Data.
    "tokenizer": tiny_tokenizer,
    "processor": tiny_processor,
    "tokenizer_without_eos": lambda: _tokenizer(eos_token=None),
    "write": lambda: _write,
    "model_folder": _model_folder,
    "empty_folder": _empty_folder,
    # Trainers.
    "trainer": _trainer,
    "trainer_with_noise": lambda: _trainer(neftune_noise_alpha=5.0),
    # The launcher.
    "parse": lambda: LaunchOptions.parse,
    "main": lambda: cli.main,
    "run_file": lambda: run_file,
}
"""By name, what makes it."""
