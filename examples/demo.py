"""The demo: the same DPO steps unpatched and patched, side by side, then one answer.

`make demo` runs it; `python examples/demo.py --help` lists what it takes.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import PeftModel
from smollm2 import smollm2_path
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl_dpo_lora import arguments, load_pairs, train


@dataclass
class Watch(TrainerCallback):
    """Loss and seconds of each step, and the tokens that the first decoder layer saw in it."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def on_train_begin(self, args, state, control, model, **kwargs):
        layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
        layer.register_forward_pre_hook(self._count)

    def on_step_begin(self, args, state, control, **kwargs):
        self.tokens.append(0)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def _count(self, layer, args):
        if self.tokens:
            self.tokens[-1] += args[0].shape[0] * args[0].shape[1]


def main() -> None:
    args = arguments("The same DPO steps, unpatched and patched").parse_args()
    model_path = args.model or smollm2_path()
    runs = {}
    for name in ("unpatched", "patched"):
        print(f"\n{name}: {args.steps} steps of {args.pairs_per_batch} pairs", flush=True)
        set_seed(42)
        runs[name] = Watch()
        output = args.output / name
        share = name == "patched"
        train(model_path, args.data, output, args.steps, args.pairs_per_batch, share, [runs[name]])
    print_table(runs["unpatched"], runs["patched"])
    draw(runs["unpatched"], runs["patched"], args.output / "demo.png")
    print(f"adapter: {args.output / 'patched' / 'adapter_model.safetensors'}")
    print(f"chart:   {args.output / 'demo.png'}\n")
    answer(model_path, args.output / "patched", args.data)


def print_table(plain: Watch, shared: Watch) -> None:
    columns = ("loss", "loss", "tokens", "tokens", "s", "s", "speed-up", "ideal")
    form = "{:>6}" + "{:>12}" * len(columns)
    print("\n" + form.format("", *["unpatched", "patched"] * 3, "", ""))
    print(form.format("step", *columns))

    def line(label, losses, tokens, seconds):
        print(
            form.format(
                label,
                *(f"{x:.6f}" for x in losses) if losses else ("", ""),
                *tokens,
                *(f"{x:.2f}" for x in seconds),
                f"{seconds[0] / seconds[1]:.2f}x",
                f"{tokens[0] / tokens[1]:.2f}x",
            )
        )

    steps = zip(
        zip(plain.losses, shared.losses, strict=True),
        zip(plain.tokens, shared.tokens, strict=True),
        zip(plain.seconds, shared.seconds, strict=True),
        strict=True,
    )
    for i, (losses, tokens, seconds) in enumerate(steps, start=1):
        line(i, losses, tokens, seconds)
    total = [(sum(plain.tokens), sum(shared.tokens)), (sum(plain.seconds), sum(shared.seconds))]
    line("all", None, *total)
    print(
        "\ntokens: decoder tokens of the policy and reference forward; ideal: their ratio.\n"
        "Patched steps ran after all unpatched ones: what else the machine did shows in seconds."
    )
    if not torch.cuda.is_available():
        print(
            "Without CUDA, TRL projects every cell of the rows through the LM head, prompts and\n"
            "padding included. Sharing does not change that part of a step; docs/limits.md has it."
        )


def draw(plain: Watch, shared: Watch, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    steps = range(1, len(plain.losses) + 1)
    left.plot(steps, plain.losses, "o-", label="unpatched", linewidth=4, alpha=0.4)
    left.plot(steps, shared.losses, "s--", label="patched")
    left.set(title="DPO loss", xlabel="step", xticks=list(steps))
    left.legend()
    names = ["unpatched", "patched"]
    colours = ["tab:blue", "tab:orange"]
    middle.bar(names, [sum(plain.tokens), sum(shared.tokens)], color=colours)
    middle.set(title="decoder tokens")
    right.bar(names, [sum(x.seconds) / len(x.seconds) for x in (plain, shared)], color=colours)
    right.set(title="seconds per step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def answer(model_path: Path | str, adapter: Path, data: Path) -> None:
    """Load the saved adapter into a fresh, unpatched model and answer the first prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    prompt = load_pairs(data)[0]["prompt"]
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"prompt ends: ...{question[-160:]!r}\nanswer:      {text.strip()!r}")


if __name__ == "__main__":
    main()
