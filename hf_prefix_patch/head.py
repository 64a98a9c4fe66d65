"""Log-probabilities of given tokens from hidden states, without their logits in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefix_patch.backends.base import autocast_dtype

# Elements of what a chunk makes, logits `[C, w]` or weights `[w, H]`. On a CPU time is flat from
# 2**21 to 2**23: below, products are too narrow, and above, passes over a chunk leave the cache.
# Elsewhere four times that, so that kernels last longer than it takes to launch them.
_CPU_CELLS, _CELLS = 2**22, 2**24
_FEWEST_ROWS = 512  # with 128 a bf16 step takes twice as long
_HALF = (torch.float16, torch.bfloat16)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`log_softmax(softcap * tanh(scale * (hidden @ weight.T + bias) / softcap))[target]`.

    The vocabulary is handled in chunks, in one pass that keeps a running maximum and sum (online
    softmax: Milakov & Gimelshein 2018, arXiv:1805.02867). No `[C, V]` tensor exists at any time,
    an idea of Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009).

    A token's log-prob depends on its own hidden state alone, so the same pass also sums up its
    gradient, `scale * (W[y] - sum_v p_v W[v])` without a cap, rescaled when the maximum grows, as
    FlashAttention does it (Dao et al. 2022, arXiv:2205.14135). With a frozen head the backward is a
    multiplication; with a trained one it computes the chunks again.

    Products are computed in the dtype of the inputs, or that of autocast, with fp32 results where
    torch offers them; the softmax is in fp32.

    Args:
        hidden: `[C, H]`, floating.
        weight: `[V, H]` of the LM head, of the dtype of `hidden` unless autocast is on.
        bias: `[V]` or None.
        target: `[C]` int64, the tokens. Ids out of range raise on a CPU; elsewhere they are not
            looked for, as that would wait for the device, and give NaN or its own assertion.
        scale: factor of the logits, as of Cohere or Granite.
        softcap: bound of the logits, as of Gemma 2, applied after `scale`; None for none.
        chunk_size: tokens of the vocabulary at once; by default so many that what a chunk makes
            has 4M elements on a CPU, 16M elsewhere.

    Returns:
        `[C]` fp32, or fp64 for fp64 inputs. Differentiable once in `hidden`, `weight` and `bias`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, ids out of range on a CPU, a
            `softcap` or `chunk_size` that is not positive.
        RuntimeError: in a backward with `create_graph=True`.

    Examples:
        >>> hidden, weight, target = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([4, 0, 49])
        >>> want = torch.log_softmax(hidden @ weight.T, dim=1)[range(3), target]
        >>> torch.allclose(linear_logps(hidden, weight, None, target), want, atol=1e-5)
        True
    """
    _check_shapes(hidden, weight, bias, target)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, but must be positive; give None for no cap")
    if chunk_size is None:
        cells = _CPU_CELLS if hidden.device.type == "cpu" else _CELLS
        chunk_size = max(_FEWEST_ROWS, cells // max(1, *hidden.shape))
    elif chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but must be 1 or more; leave it out")
    how = _How(
        scale,
        softcap,
        _compute_dtype(hidden, weight, bias),
        chunk_size,
        # Inside a Function gradients are off, and needs_input_grad does not know of no_grad.
        torch.is_grad_enabled() and hidden.requires_grad,
    )
    logps: Tensor = _LinearLogps.apply(hidden, weight, bias, target, how)  # type: ignore[no-untyped-call]
    return logps


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    shapes = f"hidden {list(hidden.shape)} and weight {list(weight.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"got {shapes}, but needs [C, H] and [V, H]; flatten rows of tokens")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {list(bias.shape)}, but needs [V] = [{len(weight)}]; pass that of the "
            "head, or None"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target is {list(target.shape)} of {target.dtype}, but needs [C] = [{len(hidden)}] of "
            "torch.int64, one id for each hidden state"
        )
    devices = {x.device for x in (hidden, weight, bias, target) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            f"inputs are on {sorted(map(str, devices))}, but must be on one; move them "
            "to one device"
        )
    if target.device.type == "cpu" and len(target):
        low, high = (int(x) for x in target.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"target has ids from {low} to {high}, but the vocabulary is 0 to "
                f"{len(weight) - 1}; drop ignored tokens (-100) with their hidden states"
            )


def _compute_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """What `F.linear` would compute in."""
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"got {sorted(map(str, dtypes))}, but hidden and weight must be floating; "
            "pass hidden states, not ids"
        )
    autocast = autocast_dtype(hidden.device)
    if autocast is not None and torch.float64 not in dtypes:
        return autocast
    if len(dtypes) > 1:
        raise ValueError(
            f"hidden and head have dtypes {sorted(map(str, dtypes))}, but must have one; cast the "
            "hidden states, or run under torch.autocast"
        )
    return hidden.dtype


class _How(NamedTuple):
    """Options of one call; `jacobian`: whether hidden states will want a gradient."""

    scale: float
    softcap: float | None
    dtype: torch.dtype
    chunk_size: int
    jacobian: bool


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: _How
    ) -> Tensor:
        target = target[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            others = _Others(hidden, target, how)
            for start in range(0, len(weight), how.chunk_size):
                others.add(weight, bias, start)
            logps, against, lse = others.compare()
            jacobian = others.jacobian(weight, against) if how.jacobian else None
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        again = (hidden, weight, bias, target, against, lse) if trained else ()
        ctx.save_for_backward(jacobian, *again)
        ctx.how, ctx.hidden_dtype = how, hidden.dtype
        return logps[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a gradient of a plain sum pass for a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_logps can be differentiated once, but got create_graph=True; compute the "
                "logits where second derivatives are needed"
            )
        jacobian, *again = ctx.saved_tensors
        of_hidden = of_weight = of_bias = None
        if jacobian is not None:
            of_hidden = (grad[:, None] * jacobian).to(ctx.hidden_dtype)
        if again:
            wanted = ctx.needs_input_grad[1:3]
            with torch.autocast(grad.device.type, enabled=False):
                of_weight, of_bias = _head_gradients(grad[:, None], again, ctx.how, wanted)
        return of_hidden, of_weight, of_bias, None, None


class _Others:
    """Softmax over all tokens but the target, of the chunks so far; statistics are `[C, 1]`.

    Of a likely target, 1 - p is what the others weigh. Taken from a sum with the target in it, that
    would be lost to rounding, and so would the gradients, which are multiples of it.
    """

    def __init__(self, hidden: Tensor, target: Tensor, how: _How) -> None:
        self._hidden, self._target, self._how = hidden, target, how
        dtype = torch.promote_types(how.dtype, torch.float32)
        # Not -inf: the exponent in a first chunk of nothing but -inf would be -inf + inf.
        self._max = torch.full_like(target, torch.finfo(dtype).min, dtype=dtype)
        self._sum = torch.zeros_like(self._max)
        self._of_target = torch.full_like(self._max, torch.nan)
        # sum_v exp(z_v - max) dz_v W[v], where dz is the slope of the cap.
        self._weights = hidden.new_zeros(hidden.shape if how.jacobian else 0, dtype=dtype)

    def add(self, weight: Tensor, bias: Tensor | None, start: int) -> None:
        rows, z, slope = _logits(self._hidden, weight, bias, start, self._how)
        column, there = _columns(self._target, start, len(rows))
        self._of_target = torch.where(there, z.gather(1, column), self._of_target)
        _place(-torch.inf, z, column, there)
        highest = torch.maximum(self._max, z.amax(1, keepdim=True))
        decay = (self._max - highest).exp_()
        e = z.sub_(highest).exp_()
        self._sum = self._sum * decay + e.sum(1, keepdim=True)
        self._max = highest
        if self._how.jacobian:
            if slope is not None:
                e *= slope
            self._weights.mul_(decay).add_(_product(e, rows, self._how.dtype))

    def compare(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the targets, 1 - p, and the log-sum-exp of all logits."""
        self._sum.clamp_(min=torch.finfo(self._sum.dtype).tiny)  # where no other token can be
        log_sum = self._sum.log()
        ahead = (self._of_target - self._max) - log_sum
        lse = self._max + (log_sum - F.logsigmoid(-ahead))
        return F.logsigmoid(ahead), torch.sigmoid(-ahead), lse

    def jacobian(self, weight: Tensor, against: Tensor) -> Tensor:
        """`[C, H]`: the gradient of each log-prob by its own hidden state.

        `scale * (1 - p_y) * (dz_y W[y] - mean of dz_v W[v] over the others)`, in the dtype of the
        statistics: that of a likely token is too small for fp16.
        """
        of_target = weight.index_select(0, self._target[:, 0]).to(against.dtype)
        if self._how.softcap is not None:
            of_target *= 1 - (self._of_target / self._how.softcap).square()
        change = of_target.sub_(self._weights.div_(self._sum))
        return change.mul_(self._how.scale * against)


def _head_gradients(
    grad: Tensor, saved: list[Any], how: _How, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias; those of a chunk are one product, so nothing is added up."""
    hidden, weight, bias, target, against, lse = saved
    of_weight = torch.empty_like(weight) if wanted[0] else None
    of_bias = torch.empty_like(bias) if wanted[1] and bias is not None else None

    def fill(start: int) -> None:
        rows, z, slope = _logits(hidden, weight, bias, start, how)
        change = z.sub_(lse).exp_()
        _place(-against, change, *_columns(target, start, len(rows)))
        change *= -how.scale * grad
        if slope is not None:
            change *= slope
        if of_weight is not None:
            of_weight[start : start + len(rows)] = _product(change.T, hidden, how.dtype)
        if of_bias is not None:
            of_bias[start : start + len(rows)] = change.sum(0)

    for start in range(0, len(weight), how.chunk_size):
        fill(start)  # a call, so that the tensors of a chunk are gone before the next
    return of_weight, of_bias


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, how: _How
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights `[w, H]` of a chunk, its logits `[C, w]`, and the slope of the cap at each."""
    rows = weight[start : start + how.chunk_size]
    z = _product(hidden, rows.T, how.dtype)
    if bias is not None:
        z += bias[start : start + how.chunk_size]
    if how.scale != 1.0:
        z *= how.scale
    if how.softcap is None:
        return rows, z, None
    z = z.div_(how.softcap).tanh_()
    slope = z.square().neg_().add_(1)
    return rows, z.mul_(how.softcap), slope


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` computed in `dtype`, in fp32 if that is a half precision."""
    if dtype == torch.float16 and a.device.type == "cpu":
        dtype = torch.float32  # torch's fp16 product on a CPU is 5 to 100 times slower
    a, b = a.to(dtype), b.to(dtype)
    if dtype in _HALF and a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(torch.promote_types(dtype, torch.float32))


def _columns(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Columns `[C, 1]` of the targets in a chunk, and which of them are in it."""
    column = target - start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _place(value: Tensor | float, x: Tensor, column: Tensor, there: Tensor) -> None:
    """Write `value` into the column of every row whose target is in the chunk."""
    x.scatter_(1, column, torch.where(there, value, x.gather(1, column)))
