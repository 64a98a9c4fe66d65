"""A model and its tokenizer from a path or a name, as a training script loads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hf_prefix_patch.features import is_classifier
from hf_prefix_patch.versions import CHECKPOINT_LAYERS, DTYPE, check_loaded

_LORA_RANK = 8
_LORA_STD = 0.02  # of its second matrix, so that both have a gradient and the model stays itself


def load_model(
    source: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    load_in_4bit: bool = False,
    attn_implementation: str | None = None,
    adapter: str | None = None,
    lora: bool = False,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a causal LM, or a sequence classifier where the config names one.

    Args:
        source: a folder or a name on the hub.
        dtype: `"auto"`, that of the checkpoint, or a name in torch.
        device: None for the accelerator that PyTorch finds (CUDA, MPS, XPU), else the CPU.
        load_in_4bit: the base model in nf4 of bitsandbytes with double quantisation, computing in
            `dtype` (bfloat16 for `"auto"`).
        attn_implementation: as transformers takes it.
        adapter: a folder or name of a PEFT adapter, which is then what is trained.
        lora: a new LoRA adapter on all linear layers instead.
        gradient_checkpointing: not reentrant.
        trust_remote_code: run code that comes with the model.

    Raises:
        OSError: no such weights or adapter.
        ImportError: bitsandbytes, accelerate or peft is needed and not installed.
        ValueError: no such model, weights that do not fit it, options that do not go together, or a
            device that is not there.
    """
    if adapter is not None and lora:
        raise ValueError("got an adapter and a new LoRA, but only one is trained; leave out one")
    place = _device(device)
    config = load_config(source, trust_remote_code)
    options: dict[str, Any] = {DTYPE: dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if load_in_4bit:
        _need("bitsandbytes", "4-bit weights")
        _need("accelerate", "4-bit weights")
        options["device_map"] = {"": place}
        options[DTYPE] = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options[DTYPE],
        )
    with _loading(f"the model from {source!r}"):
        model: Any = _class_for(config).from_pretrained(source, **options)
    if not load_in_4bit:
        model = model.to(place)
    if gradient_checkpointing:
        getattr(model, CHECKPOINT_LAYERS)({"use_reentrant": False})
    if adapter is not None or lora:
        model = _with_adapter(model, adapter)
    trained: nn.Module = model
    return trained


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer.

    Raises:
        ValueError: there is none.
    """
    return _load(AutoTokenizer, source, trust_remote_code, "tokenizer", "tokenizer.json")


def load_config(source: str, trust_remote_code: bool = False) -> Any:
    """Load a model's config, from a file too.

    Raises:
        ValueError: there is none, or transformers does not know it.
    """
    return _load(AutoConfig, source, trust_remote_code, "config", "config.json")


def _load(auto: Any, source: str, trust_remote_code: bool, what: str, file: str) -> Any:
    try:
        return auto.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # of whatever reads or checks what is there
        if source.startswith((".", "/", "~")) and not Path(source).exists():
            raise ValueError(
                f"{source!r} is not there, but must be a folder with {file}; give another path, or "
                "a name on the hub"
            ) from error
        if (Path(source) / "adapter_config.json").is_file():
            raise ValueError(
                f"{source!r} holds a PEFT adapter and no {what}, but one is needed; give the model "
                "that it adapts (`verify MODEL --adapter FOLDER`)"
            ) from error
        raise ValueError(
            f"no {what} could be loaded from {source!r}; give a folder with {file} or a name on "
            f"the hub ({_first_line(error)})"
        ) from error


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Weights that are damaged, or belong to another config, raise all kinds of errors."""
    try:
        yield
    except ImportError:  # which says what to install
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = str(error) if isinstance(error, OSError | ValueError) else _first_line(error)
        raise ValueError(
            f"{what} could not be loaded ({type(error).__name__}: {said}); check that its files "
            "are there, whole and of one model, and that the options fit it"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Of a device, or of the host, for which PyTorch has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _class_for(config: PretrainedConfig) -> Any:
    if is_classifier(config):
        return AutoModelForSequenceClassification
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map") or named is None:
        return AutoModelForCausalLM
    return named  # what it is refused for says more than that it is no causal LM


def _device(name: str | None) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return found or torch.device("cpu")
    names = ["cpu"]
    if found is not None:
        numbered = (f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))
        names += [found.type, *numbered]
    if name not in names:
        raise ValueError(
            f"device is {name!r}, but this PyTorch sees only {names}; give one of these, or check "
            "the driver, CUDA_VISIBLE_DEVICES and the build of PyTorch"
        )
    return torch.device(name)


def _need(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{what} need the package {package}, which is not installed; run "
            f"`pip install {package}`"
        )


def _with_adapter(model: PreTrainedModel, adapter: str | None) -> Any:
    _need("peft", "adapters")
    import peft

    check_loaded("peft")
    if adapter is not None:
        with _loading(f"the adapter from {adapter!r}"):
            # PEFT trains no prompt learning that it has loaded, and sharing refuses it.
            trains = not peft.PeftConfig.from_pretrained(adapter).is_prompt_learning
            return peft.PeftModel.from_pretrained(model, adapter, is_trainable=trains)
    task = "SEQ_CLS" if is_classifier(model.config) else "CAUSAL_LM"
    config = peft.LoraConfig(
        r=_LORA_RANK, lora_alpha=_LORA_RANK, target_modules="all-linear", task_type=task
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=_LORA_STD)
    return wrapped
