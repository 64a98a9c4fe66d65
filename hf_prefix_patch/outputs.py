"""What a decoder stack returns of a packed row, as rows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hf_prefix_patch.tree import PrefixTree


def unpack_output(tree: PrefixTree, output: Any, done: dict[int, Any] | None = None) -> Any:
    """The same with every tensor unpacked that has, by its shape, a line per packed token.

    Args:
        done: what was made of a tensor already: one that is there twice stays one.
    """
    done = {} if done is None else done
    if isinstance(output, Tensor):
        if id(output) not in done:
            done[id(output)] = _unpack(tree, output)
        return done[id(output)]
    if isinstance(output, dict):  # ModelOutput
        output = copy.copy(output)
        for name, value in output.items():
            output[name] = unpack_output(tree, value, done)
        return output
    if isinstance(output, tuple | list):
        return type(output)(unpack_output(tree, x, done) for x in output)
    return output


def _unpack(tree: PrefixTree, x: Tensor) -> Tensor:
    if x.shape[:2] == (1, tree.packed_tokens):
        return tree.unpack(x)
    if x.shape[1:3] == (1, tree.packed_tokens):  # Gemma 3n stacks several hidden states
        return torch.stack([tree.unpack(part) for part in x])
    if x.shape[:1] == (tree.packed_tokens,):  # router logits: [N, experts]
        return tree.unpack(x[None]).flatten(0, 1)
    return x
