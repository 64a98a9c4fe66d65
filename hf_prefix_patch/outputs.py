"""What a decoder stack returns of a packed row, as rows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hf_prefix_patch.tree import PrefixTree


def unpack_output(tree: PrefixTree, output: Any) -> Any:
    """The same with every tensor unpacked that has, by its shape, a line per packed token."""
    if isinstance(output, Tensor):
        if output.shape[:2] == (1, tree.packed_tokens):
            return tree.unpack(output)
        if output.shape[1:3] == (1, tree.packed_tokens):  # Gemma 3n stacks several hidden states
            return torch.stack([tree.unpack(x) for x in output])
        if output.shape[:1] == (tree.packed_tokens,):  # router logits: [N, experts]
            return tree.unpack(output[None]).flatten(0, 1)
        return output
    if isinstance(output, dict):  # ModelOutput
        output = copy.copy(output)
        for name, value in output.items():
            output[name] = unpack_output(tree, value)
        return output
    if isinstance(output, tuple | list):
        return type(output)(unpack_output(tree, x) for x in output)
    return output
