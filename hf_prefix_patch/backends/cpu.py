"""Plain causal attention on a CPU: one kernel call for each block of scores that is not empty.

Each chain attends to itself, and each group of chains to the stretch of keys that they share.
Outputs over several stretches are merged by their log-sum-exp (Milakov and Gimelshein,
arXiv 1805.02867); backward gives the kernel the merged output and log-sum-exp, with which the
gradients of a stretch are those within the whole softmax (Dao et al., arXiv 2205.14135, section 3).
Nothing is copied and no masked score computed beside the triangles of the chains themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_prefix_patch.backends.base import HALF, as_blocks

# The kernel behind scaled_dot_product_attention on CPUs. Called by name because the public function
# keeps the log-sum-exp to itself.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@torch.library.custom_op("hf_prefix_patch::cpu_attention", mutates_args=())
def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of the packed row; `[1, heads, N, head_dim]` all, equal head sizes.

    Args:
        blocks: of `as_tensor(chain_blocks(tree))`.

    Returns:
        Output as `[1, N, heads, head_dim]` and log-sum-exp `[1, N, heads]`.
    """
    total = torch.promote_types(query.dtype, torch.float32)
    _, heads, tokens, size = query.shape
    output = query.new_empty((1, tokens, heads, size), dtype=total)
    lse = query.new_empty((1, tokens, heads), dtype=total)
    for (q0, q1, k0, k1), causal in _calls(blocks):
        part, part_lse = _forward(
            query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], 0.0, causal, scale=scaling
        )
        part, part_lse = part.transpose(1, 2), part_lse.transpose(1, 2)
        if causal:  # comes first, and covers every token once
            output[:, q0:q1], lse[:, q0:q1] = part, part_lse
            continue
        before = lse[:, q0:q1]
        both = torch.logaddexp(before, part_lse)
        output[:, q0:q1].mul_((before - both).exp_()[..., None])
        output[:, q0:q1].add_(part * (part_lse - both).exp_()[..., None])
        lse[:, q0:q1] = both
    return output.to(query.dtype), lse


@torch.library.custom_op("hf_prefix_patch::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    blocks: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.zeros(x.shape, dtype=total) for x in (query, key, value)]
    grad, output, lse = (x.transpose(1, 2) for x in (grad, output, lse))
    for (q0, q1, k0, k1), causal in _calls(blocks):
        queries, keys = slice(q0, q1), slice(k0, k1)
        parts = _backward(
            grad[:, :, queries],
            query[:, :, queries],
            key[:, :, keys],
            value[:, :, keys],
            output[:, :, queries],
            lse[:, :, queries],
            0.0,
            causal,
            scale=scaling,
        )
        for whole, part, at in zip(grads, parts, (queries, keys, keys), strict=True):
            whole[:, :, at] += part
    dtypes = (query.dtype, key.dtype, value.dtype)
    dq, dk, dv = (x.to(dtype) for x, dtype in zip(grads, dtypes, strict=True))
    return dq, dk, dv


def served_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these: on a CPU, one type, one head size."""
    dtypes = {x.dtype for x in (query, key, value)}
    types = (*HALF, torch.float32, torch.float64)
    sizes = {x.shape[-1] for x in (query, key, value)}
    return query.device.type == "cpu" and len(dtypes | sizes) == 2 and dtypes <= set(types)


def _calls(blocks: Tensor) -> list[tuple[list[int], bool]]:
    """Blocks of scores and whether they are causal: every chain itself, then what chains see
    beside it; neighbours that see the same keys go together."""
    causal: list[tuple[list[int], bool]] = []
    whole: list[list[int]] = []
    for block in as_blocks(blocks):
        if block[:2] == block[2:]:
            causal.append((block, True))
            continue
        same = next((b for b in whole if b[2:] == block[2:] and b[1] == block[0]), None)
        if same is None:
            whole.append(block)
        else:
            same[1] = block[1]
    return causal + [(block, False) for block in whole]


@cpu_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    _, heads, tokens, size = query.shape
    total = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty((1, tokens, heads), dtype=total)
    return query.new_empty((1, tokens, heads, size)), lse


@cpu_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    blocks: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, blocks, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, *output, blocks)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: None) -> tuple[Tensor | None, ...]:
    query, key, value, output, lse, blocks = ctx.saved_tensors
    grads = cpu_attention_backward(grad, query, key, value, output, lse, blocks, ctx.scaling)
    return (*grads, None, None)


cpu_attention.register_autograd(_differentiate, setup_context=_keep)
