"""The attention call alone: every backend against attention on the rows, and gathering of keys.

    python benchmarks/attention.py [--cases 1024x256x2 ...] [--heads 9] [--kv-heads 3] [--size 64]

A case `PxRxG` is one prompt of P tokens with G responses of R, equally long rows without padding.
The unshared call is the fastest there is for them: causal without a mask, keys of grouped queries
not repeated, on CUDA the variable-length kernel as well. Forward and backward. The ideal is the
ratio of visible (query, key) pairs; it ends below that of tokens, which the rest of a decoder sees.

A second table times the copies of keys and values alone, forward and backward: slices and `cat`,
as the library does it, against `index_select`.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from charts import grouped_bars
from decoder import row_pairs, tree_pairs
from measure import fill_in, medians
from report import machine, write_table
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm

from hf_prefix_patch import PrefixTree, versions
from hf_prefix_patch.attention import BACKENDS
from hf_prefix_patch.backends.base import Needs
from hf_prefix_patch.backends.varlen import gather_paths
from hf_prefix_patch.kernel_check import kernel_fault
from hf_prefix_patch.measuring import peak_of, seconds_of
from hf_prefix_patch.selection import unserved

DEFAULTS = {
    "cpu": {
        "cases": ["512x64x2", "1024x256x2", "2048x256x2", "1024x128x8"],
        "heads": 9,
        "kv_heads": 3,
        "size": 64,
        "dtype": "float32",
        "repeats": 15,
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
GATHER_HEADER = ("prompt", "response", "responses", "keys", "index_select ms", "slices ms", "ratio")


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    fill_in(args, DEFAULTS[args.device])
    cases = [tuple(map(int, case.split("x"))) for case in args.cases]

    calls, copies = [], []
    for case in tqdm(cases, desc="cases"):
        calls += attention_lines(case, args)
        copies.append(gather_line(case, args))
    threads = f", {args.threads} threads" if args.device == "cpu" else ""
    setting = f"{machine(args.device)}{threads}, {args.heads} query and {args.kv_heads} key heads "
    setting += f"of {args.size}, {str(args.dtype).removeprefix('torch.')}, forward and backward, "
    setting += f"median of {args.repeats}"
    suffix = f"{args.device}, {args.threads} threads" if args.device == "cpu" else args.device
    draw_calls = partial(draw, table=calls)
    write_table(f"Attention alone on {suffix}", HEADER, calls, args.out, setting, draw_calls)
    title = f"Gathering keys and values on {suffix}"
    write_table(title, GATHER_HEADER, copies, args.out, setting)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add("--cases", nargs="+", metavar="PxRxG", help="prompt, response, number of responses")
    add("--heads", type=int)
    add("--kv-heads", type=int)
    add("--size", type=int, help="of a head")
    add("--repeats", type=int)
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--out", type=Path, help="folder for tables and chart")
    return parser


def attention_lines(case: tuple[int, ...], args: argparse.Namespace) -> list[tuple]:
    """A line of the table for each call: other unshared ones, and every backend that serves."""
    rows, tree = tree_of(case, args.device)
    inputs = random_inputs(tree, args)
    on_rows = [rows_of(tree, x) for x in inputs]
    calls = unshared_calls(on_rows, args) | shared_calls(tree, inputs, args)
    direction = torch.randn_like(inputs[0]).transpose(1, 2)
    steps = {}
    for name, call in calls.items():
        on = (
            (on_rows, tree.unpack(direction))
            if name.startswith("unshared")
            else (inputs, direction)
        )
        steps[name] = partial(step, call, *on)
    times, peaks = measure(steps, args)
    plain = [name for name in calls if name.startswith("unshared")]
    best = min(plain, key=times.__getitem__)
    ideal = row_pairs(rows.shape[1:] * len(rows)) / tree_pairs(tree)
    with torch.no_grad():
        want = tree.pack(calls[best]())
        errors = {
            name: ((tree.pack(call()) if name in plain else call()) - want).abs().max()
            for name, call in calls.items()
        }
    lines = []
    for name in calls:
        if name == best:
            continue
        bound = 1.0 if name in plain else ideal
        gain = times[best] / times[name]
        error = (errors[name] / want.abs().max()).item()
        memory = [peaks[x] / 2**20 for x in (best, name)]
        measured = (1e3 * times[best], 1e3 * times[name], 1 / gain, gain, bound, gain / bound)
        lines.append((*case, name, *measured, *memory, error))
    return lines


def tree_of(case: tuple[int, ...], device: str) -> tuple[Tensor, PrefixTree]:
    prompt, response, responses = case
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50_000, (responses, prompt + response), generator=generator)
    ids[:, :prompt] = ids[0, :prompt]
    ids[:, prompt] = torch.arange(responses)
    return ids, PrefixTree.from_rows(ids).to(device)


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
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
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
    return calls


def shared_calls(
    tree: PrefixTree, inputs: list[Tensor], args: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """The backends that serve, on the packed row, `[1, N, heads, size]`."""
    needs = needs_of(args)
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, backend in BACKENDS.items():
        reason = unserved(backend, needs) or kernel_fault(backend, needs)
        if reason is not None:
            tqdm.write(f"backend {name} left out: {reason}")
            continue
        kwargs = tree.model_kwargs() | backend.plan(tree, needs)
        options = {"scaling": args.size**-0.5, "dropout": 0.0}
        calls[name] = partial(backend.attend, None, *inputs, **options, **kwargs)
    return calls


def needs_of(args: argparse.Namespace) -> Needs:
    return Needs(
        device=torch.device(args.device),
        dtype=args.dtype,
        implementation="sdpa",
        head_dims=frozenset({args.size}),
        windows=frozenset({None}),
        features=frozenset(),
    )


def step(call: Callable[[], Tensor], inputs: list[Tensor], direction: Tensor) -> None:
    torch.autograd.grad(call(), inputs, direction)


def measure(
    steps: dict[str, Callable[[], Any]], args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds, measured in turn, and peak bytes of each."""
    device = torch.device(args.device)
    for call in steps.values():
        call()
    peaks = {name: peak_of(call, device) for name, call in steps.items()}
    timers = {name: partial(seconds_of, call, device) for name, call in steps.items()}
    return medians(timers, args.repeats), peaks


def gather_line(case: tuple[int, ...], args: argparse.Namespace) -> tuple:
    """Both ways to copy the keys of all paths; gradients are checked to be the same."""
    _, tree = tree_of(case, args.device)
    plan = BACKENDS["torch_varlen"].plan(tree, needs_of(args))
    blocks, count = plan["tree_blocks"], plan["tree_chains"]["num_keys"]
    stretches = [torch.arange(start, stop) for _, _, start, stop in blocks.view(-1, 4).tolist()]
    index = torch.cat(stretches).to(args.device)
    x = random_inputs(tree, args)[1][0].transpose(0, 1)
    x = x.detach().contiguous().requires_grad_()
    ways = {
        "index_select": lambda: x.index_select(0, index),
        "slices": lambda: gather_paths(x, blocks, count),
    }
    direction = torch.randn(count, *x.shape[1:], device=x.device).to(x.dtype)
    found = [torch.autograd.grad(way(), x, direction)[0] for way in ways.values()]
    torch.testing.assert_close(*found, atol=5e-2, rtol=5e-2)
    steps = {name: partial(step, way, [x], direction) for name, way in ways.items()}
    times, _ = measure(steps, args)
    times = {name: 1e3 * seconds for name, seconds in times.items()}
    return (*case, count, *times.values(), times["index_select"] / times["slices"])


def draw(figure: Any, table: list[tuple]) -> None:
    """Bars of the speed-up for each case."""
    lines = [dict(zip(HEADER, row, strict=True)) for row in table]
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
