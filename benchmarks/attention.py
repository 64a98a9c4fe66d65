"""The attention call alone: every backend against attention on the rows.

    python benchmarks/attention.py [--cases 1024x256x2 ...] [--heads 9] [--kv-heads 3] [--size 64]

A case `PxRxG` is one prompt of P tokens with G responses of R, equally long rows without padding.
The unshared call is the fastest there is for them: causal without a mask, keys of grouped queries
repeated only where no fused kernel takes them as they are, on CUDA the variable-length kernel and
installed flash implementations as well.
Forward and backward. The ideal is the ratio of visible (query, key) pairs; it ends below that of
tokens, which the rest of a decoder sees.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from charts import grouped_bars
from decoder import row_pairs, tree_pairs
from measure import (
    Attempts,
    GrowingTable,
    entry,
    flash_implementations,
    flash_name,
    medians,
    parse_call,
)
from report import machine
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from hf_prefix_patch import PrefixTree, versions
from hf_prefix_patch.attention import BACKENDS
from hf_prefix_patch.backends.base import Backend, Needs
from hf_prefix_patch.backends.sdpa import fit_heads
from hf_prefix_patch.kernel_check import AttentionStandIn, kernel_fault
from hf_prefix_patch.measuring import peak_of, seconds_of
from hf_prefix_patch.selection import unserved

DEFAULTS = {
    "cpu": {
        "cases": ["512x64x2", "1024x256x2", "2048x256x2", "1024x128x8"],
        "heads": 9,
        "kv_heads": 3,
        "size": 64,
        "dtype": "float32",
        "repeats": 31,
    },
    "cuda": {
        "cases": ["2048x256x2", "8192x256x2", "16384x1024x2", "4096x512x8", "4096x128x64"],
        "heads": 28,
        "kv_heads": 4,
        "size": 128,
        "dtype": "bfloat16",
        "repeats": 20,
    },
}
HEADER = (
    "prompt",
    "response",
    "responses",
    "call",
    "unshared ms",
    "ms",
    "time ratio",
    "speed-up",
    "ideal",
    "share of ideal",
    "unshared MiB",
    "MiB",
    "error",
)


def main(argv: list[str] | None = None) -> None:
    args = parse_call(options(), argv, DEFAULTS)
    heads = f"{args.heads} query and {args.kv_heads} key heads"
    table = table_of("Attention alone", heads, HEADER, args)
    attempts = table.attempts
    for part in tqdm(args.cases, desc="cases"):
        case = tuple(map(int, part.split("x")))
        lines = attempts(part, partial(attention_lines, case, args, attempts, part))
        if lines is None:
            lines = [(*case, "-", *[attempts.word(part)] * (len(HEADER) - 4))]
        table.add(lines)
    table.finish(partial(draw, table=table.lines))


def table_of(
    name: str, heads: str, header: tuple[str, ...], args: argparse.Namespace
) -> GrowingTable:
    """For calls on such heads."""
    threads = f", {args.threads} threads" if args.device == "cpu" else ""
    setting = f"{machine(args.device)}{threads}, {heads} of {args.size}, "
    setting += f"{str(args.dtype).removeprefix('torch.')}, forward and backward, "
    setting += f"median of {args.repeats}"
    return GrowingTable(f"{name} on {args.device}{threads}", header, args.out, setting)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--cases", nargs="+", metavar="PxRxG", help="prompt, response, number of responses")
    add("--heads", type=int)
    add("--kv-heads", type=int)
    add("--size", type=int, help="of a head")
    add("--repeats", type=int)
    return parser


def attention_lines(
    case: tuple[int, ...], args: argparse.Namespace, attempts: Attempts, part: str
) -> list[tuple]:
    """A line of the table for each call: other unshared ones, and every backend that serves.

    A call that fails is a part of its own, and the others go on without it.
    """
    prompt, response, responses = case
    tree = tree_of(*case).to(args.device)
    inputs = random_inputs(tree, args)
    on_rows = [rows_of(tree, x) for x in inputs]
    calls = unshared_calls(on_rows, args) | shared_calls(tree, inputs, args, attempts, part)
    direction = torch.randn_like(inputs[0]).transpose(1, 2)
    steps = {}
    for name, call in calls.items():
        on = (
            (on_rows, tree.unpack(direction))
            if name.startswith("unshared")
            else (inputs, direction)
        )
        steps[name] = partial(step, call, *on)
    plain = [name for name in calls if name.startswith("unshared")]
    found = measure(calls, steps, args, attempts, part)
    for name in found.outputs:
        if name in plain:
            found.outputs[name] = tree.pack(found.outputs[name])
    best = min(plain, key=lambda name: found.seconds.get(name, inf))
    ideal = row_pairs([prompt + response] * responses) / tree_pairs(tree)
    return [
        (*case, name, *entries(name, best, 1.0 if name in plain else ideal, found))
        for name in calls
        if name != best
    ]


class Found(NamedTuple):
    """Of the calls that ran seconds, peak bytes and outputs; of the others why they did not."""

    seconds: dict[str, float]
    peaks: dict[str, int]
    outputs: dict[str, Tensor]
    missing: dict[str, str]


def measure(
    calls: dict[str, Callable[[], Tensor]],
    steps: dict[str, Callable[[], None]],
    args: argparse.Namespace,
    attempts: Attempts,
    part: str,
) -> Found:
    found = Found({}, {}, {}, {})
    for name, call in calls.items():
        where = f"{part} {name}"
        ran = attempts(where, partial(first_run, steps[name], call, args.device))
        if ran is None:
            found.missing[name] = attempts.word(where)
        else:
            found.peaks[name], found.outputs[name] = ran
    found.seconds.update(time_steps({name: steps[name] for name in found.peaks}, args))
    return found


def entries(name: str, best: str, ideal: float, found: Found) -> tuple:
    """A line of the table from its fifth column on."""
    why = {x: found.missing.get(x, "") for x in (best, name)}
    lost = why[best] or why[name]
    gain = error = None
    if not lost:
        gain = found.seconds[best] / found.seconds[name]
        want = found.outputs[best]
        error = ((found.outputs[name] - want).abs().max() / want.abs().max()).item()
    return (
        *(entry(found.seconds.get(x), 1e3, why[x]) for x in (best, name)),
        entry(gain and 1 / gain, missing=lost),
        entry(gain, missing=lost),
        ideal,
        entry(gain, 1 / ideal, lost),
        *(entry(found.peaks.get(x), 2**-20, why[x]) for x in (best, name)),
        entry(error, missing=lost),
    )


def tree_of(prompt: int, response: int, responses: int, prompts: int = 1) -> PrefixTree:
    """Of so many prompts with so many responses each."""
    ids = torch.zeros(prompts, responses, prompt + response, dtype=torch.int64)
    ids[:, :, :prompt] = torch.arange(prompts)[:, None, None]
    ids[:, :, prompt:] = prompts + torch.arange(responses)[:, None]
    return PrefixTree.from_rows(ids.flatten(0, 1))


def random_inputs(tree: PrefixTree, args: argparse.Namespace) -> list[Tensor]:
    """Queries, keys and values `[1, heads, N, size]`, laid out by tokens as projections are."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tree.packed_tokens, n, args.size) for n in (args.heads, *[args.kv_heads] * 2)]
    draws = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(args.device, args.dtype).transpose(1, 2).requires_grad_() for x in draws]


def rows_of(tree: PrefixTree, x: Tensor) -> Tensor:
    """`[1, heads, N, size]` to `[R, heads, L, size]`, a leaf of its own, laid out by tokens too."""
    rows = tree.unpack(x.detach().transpose(1, 2))
    return rows.contiguous().transpose(1, 2).requires_grad_()


def unshared_calls(
    inputs: list[Tensor], args: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """Calls on the rows, `[R, L, heads, size]`."""
    q, k, v = inputs

    def sdpa() -> Tensor:
        keys, values = fit_heads(q, k, v, None, 0.0, causal=True)
        grouped = q.shape[1] != keys.shape[1]
        output = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)
        return output.transpose(1, 2)

    calls: dict[str, Callable[[], Tensor]] = {"unshared sdpa": sdpa}
    if unserved(BACKENDS["torch_varlen"], needs_of(args)) is None:
        count, length = q.shape[0], q.shape[2]
        ends = torch.arange(count + 1, dtype=torch.int32, device=q.device) * length
        grouped = {"enable_gqa": True} if versions.VARLEN_IS_TOLD_OF_GROUPS else {}

        def varlen() -> Tensor:
            flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
            output = varlen_attn(
                *flat, ends, ends.clone(), length, length, window_size=(-1, 0), **grouped
            )
            return output.unflatten(0, (count, length))

        calls["unshared varlen"] = varlen

    def flash(implementation: str) -> Tensor:
        return _flash_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attention_mask=None,
            query_length=q.shape[2],
            is_causal=True,
            attn_implementation=implementation,
        )

    for name in flash_implementations(args.device):
        if unserved(BACKENDS["flash"], needs_of(args, name)) is None:
            calls[f"unshared {flash_name(name)}"] = partial(flash, name)
    return calls


def shared_calls(
    tree: PrefixTree,
    inputs: list[Tensor],
    args: argparse.Namespace,
    attempts: Attempts,
    part: str,
) -> dict[str, Callable[[], Tensor]]:
    """The backends that serve, on the packed row, `[1, N, heads, size]`.

    The backend "flash" is there once for each flash implementation that is installed.
    """
    sides = {name: (backend, "sdpa") for name, backend in BACKENDS.items()}
    installed = flash_implementations(args.device)
    if installed:
        flash = sides.pop("flash")[0]
        sides |= {flash_name(name): (flash, name) for name in installed}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, side in sides.items():
        where = f"{part} {name}, plan"
        call = attempts(where, partial(shared_call, *side, tree, inputs, args))
        if callable(call):
            calls[name] = call
        else:
            tqdm.write(f"backend {name} left out: {call or attempts.word(where)}")
    return calls


def shared_call(
    backend: Backend,
    implementation: str,
    tree: PrefixTree,
    inputs: list[Tensor],
    args: argparse.Namespace,
) -> Callable[[], Tensor] | str:
    """The call, or why the backend does not serve."""
    needs = needs_of(args, implementation)
    reason = unserved(backend, needs) or kernel_fault(backend, needs)
    if reason is not None:
        return reason
    kwargs = tree.model_kwargs() | backend.plan(tree, needs)
    options = {"scaling": args.size**-0.5, "dropout": 0.0}
    return partial(backend.attend, AttentionStandIn(needs), *inputs, **options, **kwargs)


def needs_of(args: argparse.Namespace, implementation: str = "sdpa") -> Needs:
    return Needs(
        device=torch.device(args.device),
        dtype=args.dtype,
        implementation=implementation,
        head_dims=frozenset({args.size}),
        windows=frozenset({None}),
        features=frozenset(),
    )


def step(call: Callable[[], Tensor], inputs: list[Tensor], direction: Tensor) -> None:
    torch.autograd.grad(call(), inputs, direction)


def first_run(
    step: Callable[[], Any], call: Callable[[], Tensor], device: str
) -> tuple[int, Tensor]:
    """Peak bytes of a step after one to warm up, and what the call returns."""
    step()
    peak = peak_of(step, torch.device(device))
    with torch.no_grad():
        return peak, call()


def time_steps(steps: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each, measured in turn, each right after once more of its own: what another
    left in the caches says nothing of it."""
    device = torch.device(args.device)

    def again(step: Callable[[], Any]) -> float:
        step()
        return seconds_of(step, device)

    return medians({name: partial(again, step) for name, step in steps.items()}, args.repeats)


def draw(figure: Any, table: list[tuple]) -> None:
    """Bars of the speed-up for each case, where it was measured."""
    lines = [dict(zip(HEADER, row, strict=True)) for row in table]
    lines = [line for line in lines if not isinstance(line["speed-up"], str)]
    if not lines:
        return
    names = list(dict.fromkeys(line["call"] for line in lines))
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for line in lines:
        case = f"prompt {line['prompt']}, {line['responses']} responses of {line['response']}"
        groups.setdefault(case, {})[line["call"]] = line["speed-up"], line["ideal"]
    nothing = (0.0, 0.0)
    bars = {name: [group.get(name, nothing) for group in groups.values()] for name in names}
    grouped_bars(figure, list(groups), bars, "speed-up over unshared attention")


if __name__ == "__main__":
    main()
