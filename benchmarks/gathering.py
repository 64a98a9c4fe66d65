"""Copies of keys and values along the paths of the tree, forward and backward, three ways.

    python benchmarks/gathering.py [--cases 1024x256x2x4 ...] [--kv-heads 3] [--size 64]

A case `PxRxGxB` is B prompts of P tokens with G responses of R each. `index_select` leaves backward
to autograd, whose sums are atomic on CUDA. `slices` joins slices and adds their gradients in order,
in fp32; the library selects and sums bags of embeddings, in order and in fp32 too. All copy the
same bytes, so the ideal is 1; their gradients are checked to be the same. With few tokens it is the
cost of starting kernels that is measured, which grows with the number of slices: of a layer on a
GPU, it may be more than what the copies take.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attention import needs_of, step, table_of, time_steps, tree_of
from measure import parse_call
from torch import Tensor
from tqdm import tqdm

from hf_prefix_patch import PrefixTree
from hf_prefix_patch.attention import BACKENDS
from hf_prefix_patch.backends.varlen import gather_paths
from hf_prefix_patch.measuring import peak_of

DEFAULTS = {
    "cpu": {
        "cases": ["16x8x2x1", "16x8x2x8", "1024x256x2x1", "1024x256x2x4", "1024x128x8x1"],
        "kv_heads": 3,
        "size": 64,
        "dtype": "float32",
    },
    "cuda": {
        "cases": ["16x8x2x8", "2048x256x2x1", "2048x256x2x4", "16384x1024x2x1", "4096x128x64x1"],
        "kv_heads": 4,
        "size": 128,
        "dtype": "bfloat16",
    },
}
WAYS = "index_select", "slices", "library"
HEADER = (
    "prompt",
    "response",
    "responses",
    "prompts",
    "keys",
    *(f"{way} ms" for way in WAYS),
    "speed-up over index_select",
    "speed-up over slices",
    "ideal",
    *(f"{way} MiB" for way in WAYS),
)


def main(argv: list[str] | None = None) -> None:
    args = parse_call(options(), argv, DEFAULTS)
    table = table_of("Gathering keys and values", f"{args.kv_heads} key heads", HEADER, args)
    attempts = table.attempts
    for part in tqdm(args.cases, desc="cases"):
        case = tuple(map(int, part.split("x")))
        line = attempts(part, partial(gather_line, case, args))
        table.add([line or (*case, *[attempts.word(part)] * (len(HEADER) - len(case)))])
    table.finish()


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--cases", nargs="+", metavar="PxRxGxB", help="prompt, response, number of each")
    add("--kv-heads", type=int)
    add("--size", type=int, help="of a head")
    add("--repeats", type=int, default=50)
    return parser


def gather_line(case: tuple[int, ...], args: argparse.Namespace) -> tuple:
    if case[2] < 2:
        raise ValueError(
            f"a prompt has {case[2]} responses, but must have two for its keys to be gathered; "
            "give cases PxRxGxB with G of at least 2"
        )
    tree, needs = tree_of(*case).to(args.device), needs_of(args)
    chains = BACKENDS["torch_varlen"].plan(tree, needs)["tree_chains"][None]
    inputs, directions = tensors(tree, chains["num_keys"], args)
    path = chains["keys"], chains["places"], chains["starts"]
    keys, stretches = path[0].long(), consecutive(path[0])
    ways = {
        "index_select": lambda *inputs: [x.index_select(0, keys) for x in inputs],
        "slices": lambda *inputs: [Slices.apply(x, stretches) for x in inputs],
        "library": lambda *inputs: gather_paths(*inputs, *path),
    }
    check(ways, inputs, directions)
    steps = {
        name: partial(step, partial(way, *inputs), inputs, directions) for name, way in ways.items()
    }
    peaks = {name: peak_of(call, needs.device) for name, call in steps.items()}
    times = time_steps(steps, args)
    return (
        *case,
        chains["num_keys"],
        *(1e3 * times[way] for way in WAYS),
        times["index_select"] / times["library"],
        times["slices"] / times["library"],
        1.0,
        *(peaks[way] / 2**20 for way in WAYS),
    )


def check(
    ways: dict[str, Callable[..., Any]], inputs: list[Tensor], directions: list[Tensor]
) -> None:
    """All ways have the same gradients in fp64: in half precision `index_select` rounds each sum of
    a token's copies as it goes.

    Raises:
        AssertionError: they have not.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    along = [x.double() for x in directions]
    first, *others = (torch.autograd.grad(way(*exact), exact, along) for way in ways.values())
    for other in others:
        torch.testing.assert_close(other, first)


class Slices(torch.autograd.Function):
    """Slices of `x`, end to end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stretches: list[slice]) -> Tensor:
        ctx.stretches, ctx.shape = stretches, x.shape
        return torch.cat([x[part] for part in stretches])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = torch.promote_types(grad.dtype, torch.float32)
        sums = grad.new_zeros(ctx.shape, dtype=total)
        at = 0
        for part in ctx.stretches:
            length = part.stop - part.start
            sums[part] += grad[at : at + length]
            at += length
        return sums.to(grad.dtype), None


def tensors(
    tree: PrefixTree, num_keys: int, args: argparse.Namespace
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values `[N, heads, size]`, and gradients of the gathered ones."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int) -> Tensor:
        shape = tokens, args.kv_heads, args.size
        return torch.randn(shape, generator=generator).to(args.device, args.dtype)

    inputs = [draw(tree.packed_tokens).requires_grad_() for _ in range(2)]
    return inputs, [draw(num_keys) for _ in range(2)]


def consecutive(keys: Tensor) -> list[slice]:
    """The stretches of the packed row that the keys are of."""
    cuts = (keys.diff() != 1).nonzero()[:, 0] + 1
    return [slice(int(part[0]), int(part[-1]) + 1) for part in keys.tensor_split(cuts.cpu())]


if __name__ == "__main__":
    main()
