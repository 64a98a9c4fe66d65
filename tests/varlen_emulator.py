"""Variable-length attention in plain PyTorch, as documented, to stand in for CUDA kernels.

Sources: the docstring of `torch.nn.attention.varlen.varlen_attn` (torch 2.13), and the README of
flash-attention 2 for bottom-right alignment (since 2.1) and inclusive windows. The stand-ins check
what the kernels take for granted, and keep their calls for tests to look at.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import modeling_flash_attention_utils as hf_flash

from hf_prefix_patch import attention, versions
from hf_prefix_patch.backends.base import Backend, Needs
from hf_prefix_patch.backends.sdpa import SDPA

_REAL_VARLEN_ATTN = varlen.varlen_attn


def serve(
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
    unserved: Callable[[Needs], str | None] = SDPA.unserved,
) -> None:
    """Let a backend serve what `unserved` allows, by default everything: an emulator runs here."""
    changed = dataclasses.replace(backend, unserved=unserved)
    monkeypatch.setitem(attention.BACKENDS, backend.name, changed)


def needs_half(asked: Needs) -> str | None:
    """What a backend that computes in bf16 alone does not serve, for `serve`."""
    return None if asked.dtype == torch.bfloat16 else "not float32"


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`[Tq, H, D]` queries on `[Tk, Hkv, D]` keys; query i of n sees keys from `i + m - n - left`
    to `i + m - n + right` of its m, all on a side that is negative."""
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    outputs = []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(starts_q) - 1):
        queries = q[starts_q[s] : starts_q[s + 1]].transpose(0, 1)
        keys, values = (
            x[starts_k[s] : starts_k[s + 1]]
            .transpose(0, 1)
            .repeat_interleave(q.shape[1] // k.shape[1], dim=0)
            for x in (k, v)
        )
        n, m = queries.shape[1], keys.shape[1]
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(n, device=q.device)[:, None] + m - n
        key = torch.arange(m, device=q.device)
        seen = (key >= at - left if left >= 0 else True) & (
            key <= at + right if right >= 0 else torch.ones(n, m, dtype=torch.bool, device=q.device)
        )
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, n, 1)], dim=-1)
        outputs.append((scores.softmax(-1)[..., :m] @ values).transpose(0, 1))
    return torch.cat(outputs)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    for cu_seqlens, tokens, longest in (
        (cu_seqlens_q, q.shape[0], max_seqlen_q),
        (cu_seqlens_k, k.shape[0], max_seqlen_k),
    ):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.ndim == 1
        assert cu_seqlens.is_contiguous()
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == tokens
        assert type(longest) is int
        assert cu_seqlens.diff().max() == longest
        assert cu_seqlens.diff().min() > 0
    assert cu_seqlens_q is not cu_seqlens_k  # the same object means self-attention to some kernels
    assert cu_seqlens_q.shape == cu_seqlens_k.shape
    assert q.ndim == k.ndim == v.ndim == 3
    assert k.shape == v.shape
    assert q.shape[2] == k.shape[2]
    assert q.shape[1] % k.shape[1] == 0
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert q.dtype == k.dtype == v.dtype


def install_torch_varlen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for `torch.nn.attention.varlen.varlen_attn`; the calls, by argument."""
    calls: list[dict[str, Any]] = []

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(_REAL_VARLEN_ATTN).bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        calls.append(call)
        if versions.VARLEN_IS_TOLD_OF_GROUPS and call["query"].shape[1] != call["key"].shape[1]:
            assert call["enable_gqa"]
        names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale")
        return varlen_attention(*(call[name] for name in names), *call["window_size"])

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return calls


def flash_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """flash-attention 2: causal means that nothing on the right is seen, whatever the window."""
    right = 0 if causal else window_size[1]
    rest = (softmax_scale, window_size[0], right, softcap)
    return varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest)


def flash_with_sinks(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    s_aux=None,
):
    """A kernel with sinks and without dropout or soft cap that returns its log-sum-exp too."""
    right = 0 if causal else window_size[1]
    rest = (softmax_scale, window_size[0], right, 0.0, s_aux)
    output = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest
    )
    return output, None


def uninstall_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flash attention at all."""

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("no such package")

    monkeypatch.setattr(hf_flash, "_lazy_imports", missing, raising=False)
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)


def install_flash(monkeypatch: pytest.MonkeyPatch, function: Any = flash_2) -> list[dict[str, Any]]:
    """Stand in for what transformers resolves for every flash implementation; its calls."""
    calls: list[dict[str, Any]] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return function(*args, **kwargs)

    recording.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    if versions.FLASH_IS_RESOLVED:
        others = 3 if hasattr(hf_flash, "_flash_with_kvcache_fn") else 2
        functions = (None, recording, *[None] * others)
        monkeypatch.setattr(hf_flash, "_lazy_imports", lambda *args, **kwargs: functions)
        kept = ("_loaded_implementation", "_flash_varlen_fn", "_process_flash_kwargs_fn")
        for name in kept:
            monkeypatch.setattr(hf_flash, name, None, raising=False)
        return calls
    package = SimpleNamespace(flash_attn_varlen_func=recording)
    monkeypatch.setattr(hf_flash, "flash_attn_2_varlen_func", recording)
    monkeypatch.setattr(hf_flash, "flash_attn_3_varlen_func", recording)
    monkeypatch.setattr(hf_flash, "_flash_supports_window_size", True)
    monkeypatch.setattr(
        hf_flash, "flash_241", "deterministic" in recording.__signature__.parameters
    )
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, package)
    return calls
