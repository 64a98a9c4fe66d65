"""The `sdpa` backend: `scaled_dot_product_attention` for one chain after the other.

Runs on every device and in every dtype, with windows, soft caps, sinks and dropout. Never builds a
mask of the whole packed row against itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import (
    SDPAParams,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from hf_prefix_patch.backends.base import (
    Backend,
    Needs,
    as_blocks,
    as_tensor,
    chain_blocks,
    segment_blocks,
    to_autocast_dtype,
)
from hf_prefix_patch.backends.cpu import cpu_attention, served_on_cpu
from hf_prefix_patch.tree import PrefixTree

_CHUNK = 256  # queries that share a mask at most, where there is a window


def sdpa_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree_blocks: Tensor,
    tree_segments: Tensor,
    **unused: Any,
) -> Tensor:
    """Shared attention of the packed row.

    Args:
        query: `[1, heads, N, head_dim]`; key and value may have fewer heads.
        sliding_window: number of keys seen, the query's own included.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, section 2).
        s_aux: `[heads]` attention sinks: one more score of each query, whose weight goes nowhere.
        tree_blocks: of `as_tensor(chain_blocks(tree))`.
        tree_segments: of `as_tensor(segment_blocks(tree))`.

    Returns:
        `[1, N, heads, head_dim]`.
    """
    query, key, value = to_autocast_dtype(query, key, value)
    plain = sliding_window is None and softcap is None and s_aux is None and not dropout
    output: Tensor
    if plain and served_on_cpu(query, key, value):
        output = cpu_attention(query, key, value, tree_segments, scaling)[0]
        return output
    options = (scaling, dropout, sliding_window, softcap)
    if torch.compiler.is_compiling():
        seed = torch.randint(2**62, (1,), device="cpu") if dropout else None
        output = chain_attention(query, key, value, s_aux, tree_blocks, seed, *options)
        return output
    return _attend_chains(query, key, value, s_aux, tree_blocks, *options)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """cuDNN builds a plan for every new shape, which takes many times as long as the attention, and
    every batch has chains of new lengths. Other fused kernels serve, if the user allows any."""
    cuda: Any = torch.backends.cuda
    allowed = cuda.cudnn_sdp_enabled()
    others = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()
    cuda.enable_cudnn_sdp(allowed and not others)
    try:
        yield
    finally:
        if allowed:  # threads that overlap must not leave it off
            cuda.enable_cudnn_sdp(True)


@_without_cudnn()
def _attend_chains(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    blocks: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    paths = [
        (stop - start, [block[2:] for block in path])
        for (start, stop), path in groupby(as_blocks(blocks), key=lambda block: block[:2])
    ]
    chains = torch.split(query, [length for length, _ in paths], dim=2)
    stretches = [stretch for _, path in paths for stretch in path]
    keys, values = (_slices(x, stretches) for x in (key, value))
    outputs = []
    for q, (_, path) in zip(chains, paths, strict=True):
        k, v = (_join([next(pieces) for _ in path]) for pieces in (keys, values))
        narrow = window if window is not None and window < k.shape[2] else None
        for inputs in [(q, k, v)] if narrow is None else _chunks(q, k, v, narrow):
            if softcap is None and sinks is None:
                output = _fused(*inputs, scaling, dropout, narrow)
            else:
                output = _explicit(*inputs, scaling, dropout, narrow, softcap, sinks)
            outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, window: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries of a chain part by part, each with the keys that its window reaches."""
    chunks = torch.split(q, _CHUNK, dim=2)
    stops = accumulate((x.shape[2] for x in chunks), initial=k.shape[2] - q.shape[2])
    reach = [(max(0, start - window + 1), stop) for start, stop in pairwise(stops)]
    return zip(chunks, _slices(k, reach), _slices(v, reach), strict=True)


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _slices(x: Tensor, stretches: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Stretches of the tokens of `[1, heads, N, D]`, which may overlap.

    Backward adds the gradients of those that are together no longer than `x` at once: more of them
    would be kept until the last one is there. To be taken one by one, each right before it is used,
    as autograd begins with what was made last.
    """
    group: list[tuple[int, ...]] = []
    room = x.shape[2]
    for start, stop in stretches:
        if stop - start > room:
            yield from _group(x, group)
            group, room = [], x.shape[2]
        group.append((start, stop))
        room -= stop - start
    yield from _group(x, group)


def _group(x: Tensor, stretches: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    if len(stretches) == 1:
        return (x[:, :, slice(*stretches[0])],)
    pieces: tuple[Tensor, ...] = _Slices.apply(x, stretches)  # type: ignore[no-untyped-call]
    return pieces


class _Slices(torch.autograd.Function):
    """Has a backward of its own: autograd takes each slice back as a tensor of all tokens, zero but
    for a few. This one adds all gradients to one tensor, in fp32 or better."""

    @staticmethod
    def forward(x: Tensor, stretches: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        return tuple(x[:, :, slice(*stretch)] for stretch in stretches)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.stretches = inputs
        ctx.size, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        pairs = [(x, slice(*y)) for x, y in zip(grads, ctx.stretches, strict=True) if x is not None]
        if not pairs:
            return None, None
        # Made of a gradient: `is_grads_batched` has another dimension in them all.
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        total = pairs[0][0].new_zeros(ctx.size, dtype=dtype)
        for grad, stretch in pairs:
            total[:, :, stretch] += grad
        return total.to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, ...]:
        return _Slices.forward(tangent, ctx.stretches)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None
) -> Tensor:
    """Causal attention of `n` queries to `m >= n` keys, aligned bottom-right."""
    n, m = q.shape[2], k.shape[2]
    # The causal kernel skips half of the scores but aligns top-left: up to as many keys ahead of
    # the chain as it has queries, dummy queries before it cost less than a mask does.
    align = m - n if window is None and 1 < n < m <= 2 * n else 0
    causal = window is None and (n == m or align > 0)
    mask = None if causal or (n == 1 and window is None) else _visible(n, m, window, q.device)
    aligned = F.pad(q, (0, 0, align, 0)) if align else q
    k, v = fit_heads(aligned, k, v, mask, dropout, causal)
    output = F.scaled_dot_product_attention(
        aligned,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[:, :, align:]


def fit_heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Keys and values, their heads repeated where no fused kernel takes fewer than of queries."""
    if q.shape[1] == k.shape[1] or _takes_groups(q, k, v, mask, dropout, causal):
        return k, v
    return _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])


def _takes_groups(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> bool:
    """Whether a fused kernel takes keys and values of fewer heads.

    On CUDA FlashAttention does; what it does not serve (a mask, fp32, GPUs before Ampere, heads of
    more than 256) the memory-efficient kernel takes from torch 2.14 on. Before, it is left to the
    math kernel, which keeps all scores. What other GPUs do depends on the release of torch.
    """
    if q.is_cuda:
        params = SDPAParams(q, k, v, mask, dropout, causal, True)
        return can_use_flash_attention(params) or can_use_efficient_attention(params)
    return q.device.type == "cpu"


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with explicit scores, for what the fused kernels have no argument for."""
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = ~_visible(q.shape[2], k.shape[2], window, q.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    at_least_fp32 = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=at_least_fp32)[..., : k.shape[2]]
    return F.dropout(weights.to(q.dtype), dropout) @ v


def _visible(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """`[n, m]` bool: the keys that each query sees; a window counts the query's own key."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return mask if window is None else mask.triu(m - n - window + 1)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


# In a compiled layer the loop over chains would be unrolled and compiled anew for every tree. There
# it is one opaque operator, which pays with a second forward in backward.


@torch.library.custom_op("hf_prefix_patch::chain_attention", mutates_args=())
def chain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    blocks: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The same as `_attend_chains`; with dropout, drawn from `seed` (`[1]` int64)."""
    with _seeded(seed, query.device):
        options = (scaling, dropout, window, softcap)
        return _attend_chains(query, key, value, sinks, blocks, *options)


@torch.library.custom_op("hf_prefix_patch::chain_attention_backward", mutates_args=())
def chain_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    blocks: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return _attend_chains(q, k, v, s, blocks, scaling, dropout, window, softcap)

    inputs = (query, key, value) if sinks is None else (query, key, value, sinks)
    with _seeded(seed, query.device):
        # Autograd is off inside an operator, torch.func is not.
        grads: tuple[Tensor, ...] = torch.func.vjp(attend, *inputs)[1](grad)
    return [x.contiguous() for x in grads]


@contextmanager
def _seeded(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    on_cpu = device.type == "cpu"
    # Of this device alone: those of others would not come back.
    seeded = torch.default_generator if on_cpu else getattr(torch, device.type)
    with torch.random.fork_rng([] if on_cpu else [device], device_type=device.type):
        seeded.manual_seed(int(seed))
        yield


@chain_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty((1, tokens, heads, value.shape[-1]))


@chain_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Any, *rest: Any) -> Any:
    return [x.new_empty(x.shape) for x in (query, key, value, sinks) if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.dropout, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    options = (ctx.scaling, ctx.dropout, ctx.window, ctx.softcap)
    grads = chain_attention_backward(grad, *ctx.saved_tensors, *options)
    return (*grads, *[None] * (10 - len(grads)))


chain_attention.register_autograd(_differentiate, setup_context=_keep)


def _plan(tree: PrefixTree, needs: Needs) -> dict[str, Any]:
    return {
        "tree_blocks": as_tensor(chain_blocks(tree)),
        "tree_segments": as_tensor(segment_blocks(tree)),
    }


def _unserved(needs: Needs) -> str | None:
    return None


SDPA = Backend(
    name="sdpa",
    attend=sdpa_attend,
    plan=_plan,
    unserved=_unserved,
    features=frozenset({"window", "softcap", "sinks", "dropout"}),
)
