"""What a backend is, what a model needs of one, and the chains that they attend by.

A *chain* is a segment followed by the first child of each: a stretch of the packed row that is also
the end of one root-to-leaf path. A prompt and its first response are one chain, every further
response is another. In a chain attention is causal, and what its tokens see beside it is the part
of its ancestors' chains before it branched off, whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_prefix_patch.tree import PrefixTree

HALF = (torch.float16, torch.bfloat16)

_Plan = TypeVar("_Plan")


@dataclass(frozen=True)
class Needs:
    """What the attention of a model asks of a backend, in the state that it is called in.

    Attributes:
        device: where the model runs.
        dtype: that attention computes in: autocast's if it is on, else the model's.
        implementation: what the model's config names (`"sdpa"`, `"flash_attention_2"`, ...).
        head_dims: sizes of its query, key and value heads.
        windows: sliding windows of its layers, in keys; None stands for a layer without one.
        features: those of `"window"`, `"softcap"`, `"sinks"` and `"dropout"` that it uses.
        kernels: of PyTorch's attention, those whose switch is on: some of `"flash"`, `"efficient"`,
            `"cudnn"` and `"math"`.
        flash_impl: what stands in the place of PyTorch's own FlashAttention, if anything does.
    """

    device: torch.device
    dtype: torch.dtype
    implementation: str
    head_dims: frozenset[int]
    windows: frozenset[int | None]
    features: frozenset[str]
    kernels: frozenset[str] = frozenset({"flash", "efficient", "cudnn", "math"})
    flash_impl: str | None = None


@dataclass(frozen=True)
class Backend:
    """One way to run shared attention.

    Attributes:
        name: what `enable_prefix_sharing(backend=...)` takes.
        attend: `(module, query, key, value, *, scaling, dropout, sliding_window, softcap, s_aux,
            **descriptors)` to `[1, N, heads, head_dim]`; query, key and value are
            `[1, heads, N, head_dim]`.
        plan: from the tree and the needs, what `attend` wants beside the five public descriptors;
            once a batch.
        unserved: why it cannot serve these needs; None if it can.
        features: the optional arguments that `attend` honours, named as in `Needs.features`.
    """

    name: str
    attend: Callable[..., Tensor]
    plan: Callable[[PrefixTree, Needs], dict[str, Any]]
    unserved: Callable[[Needs], str | None]
    features: frozenset[str]


def of_window(plans: Mapping[int | None, _Plan], window: int | None, module: nn.Module) -> _Plan:
    """What was planned for layers with this window.

    Raises:
        NotImplementedError: nothing was, as the config names no such window.
    """
    if window not in plans:
        raise NotImplementedError(
            f"{type(module).__name__} passes the sliding window {window}, but its config says "
            f'{list(plans)}; pass backend="sdpa"'
        )
    return plans[window]


def chain_blocks(tree: PrefixTree) -> list[tuple[int, int, int, int]]:
    """`(query start, query stop, key start, key stop)`, chain by chain, each path from the root.

    The last block of a chain is the chain itself, causal; its other blocks are seen whole.
    """
    paths: list[tuple[tuple[int, int], ...]] = []  # of each segment, as packed stretches
    chains: list[tuple[tuple[int, int], ...]] = []
    for parent, (start, stop) in zip(tree.parents, _segments(tree), strict=True):
        path = paths[parent] if parent >= 0 else ()
        if path and path[-1][1] == start:  # the first child
            path = (*path[:-1], (path[-1][0], stop))
            chains[-1] = path
        else:
            path = (*path, (start, stop))
            chains.append(path)
        paths.append(path)
    return [(*path[-1], *block) for path in chains for block in path]


def subtree_ends(tree: PrefixTree) -> list[int]:
    """Where each segment or the last of its descendants stops in the packed row."""
    ends = list(accumulate(tree.segment_lengths))
    for s in reversed(range(len(ends))):
        if tree.parents[s] >= 0:
            ends[tree.parents[s]] = max(ends[tree.parents[s]], ends[s])
    return ends


def segment_blocks(tree: PrefixTree) -> list[tuple[int, int, int, int]]:
    """The same scores segment by segment: each on itself, causal, and right after that all of its
    descendants, which follow it in the packed row, on the whole of it."""
    blocks = []
    for (start, stop), end in zip(_segments(tree), subtree_ends(tree), strict=True):
        blocks.append((start, stop, start, stop))
        if stop < end:
            blocks.append((stop, end, start, stop))
    return blocks


def _segments(tree: PrefixTree) -> Iterator[tuple[int, int]]:
    """Where segments start and stop in the packed row."""
    return pairwise(accumulate(tree.segment_lengths, initial=0))


def as_tensor(blocks: Sequence[Sequence[int]]) -> Tensor:
    """Blocks as `[4 M]` int64 on the host: what operators in compiled layers can take.

    Flat, because torch.compile makes code of its own for a dimension of one.
    """
    flat = [x for block in blocks for x in block]
    return varying(torch.tensor(flat, dtype=torch.int64, device="cpu"))


def varying(x: Tensor) -> Tensor:
    """Tell torch.compile, if anyone uses it, that the length of `x` changes from batch to batch."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.maybe_mark_dynamic(x, 0)
    return x


def as_blocks(flat: Tensor) -> tuple[tuple[int, ...], ...]:
    """What `as_tensor` was given."""
    return tuple(map(tuple, flat.view(-1, 4).tolist()))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of fp32 on a device; None where it is off or unknown (meta)."""
    # Compiled code has no such device, and torch 2.11 cannot trace the question.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    on = known and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """fp32 tensors as autocast's type if it is on: as it treats attention's own inputs."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose last dimension is contiguous, which kernels take for granted."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
