"""Kernels of CUDA that a CPU plays: FlashAttention's by the emulator, FlexAttention by its mask."""

from __future__ import annotations

import inspect
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import varlen_emulator
from torch import Tensor
from torch.nn.attention import varlen
from transformers import PreTrainedModel, utils
from transformers import modeling_flash_attention_utils as hf_flash

from hf_prefix_patch.backends import flex, sdpa
from played.device import unwatched

_BLOCK = 128


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of each that the backends call."""
    varlen_emulator.install_torch_varlen(monkeypatch)
    monkeypatch.setattr(varlen, "varlen_attn", _in_fp32(varlen.varlen_attn))
    monkeypatch.setattr(flex, "flex_attention", flex_attention)
    monkeypatch.setattr(flex, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(sdpa, "SDPAParams", lambda *params: params)
    monkeypatch.setattr(sdpa, "can_use_flash_attention", flash_serves)
    monkeypatch.setattr(sdpa, "can_use_efficient_attention", lambda params: False)  # torch < 2.14
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    flash = _in_fp32(_flash_2)
    functions = (_of_rows(flash), flash, None, hf_flash._pad_input, hf_flash._unpad_input)
    monkeypatch.setattr(hf_flash, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(
        PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **kwargs: True
    )


def _in_fp32(function: Any) -> Any:
    """Kernels take half precision and compute in fp32."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tensors = (query, key, value, *args, *kwargs.values())
        assert all(x.is_cuda for x in tensors if isinstance(x, Tensor))
        with unwatched():
            inputs = (x.float() for x in (query, key, value))
            return function(*inputs, *args, **kwargs).to(query.dtype)

    kernel.__signature__ = inspect.signature(function)
    return kernel


@wraps(varlen_emulator.flash_2)
def _flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs):
    """transformers gives one tensor twice, and lengths as tensors, which FlashAttention-2 does not
    mind."""
    ends, longest = (cu_seqlens_q, cu_seqlens_k.clone()), (int(max_seqlen_q), int(max_seqlen_k))
    return varlen_emulator.flash_2(q, k, v, *ends, *longest, **kwargs)


def _of_rows(flash: Any) -> Any:
    """The function for rows without padding, of the one for sequences of any length."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        rows, length = query.shape[:2]
        starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * length
        flat = (x.flatten(0, 1) for x in (query, key, value))
        output = flash(*flat, starts, starts, length, length, **options)
        return output.unflatten(0, (rows, length))

    return kernel


_real_attention = F.scaled_dot_product_attention


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Which kernel PyTorch's own takes is asked of CUDA: a fused one here, unless keys have fewer
    heads than its memory-efficient one needs."""
    if not query.is_cuda:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return _real_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    grouped = query.shape[-3] != key.shape[-3]
    assert enable_gqa or not grouped
    fused = not grouped or flash_serves((query, key, value, attn_mask))
    if not fused and not torch.backends.cuda.math_sdp_enabled():
        raise RuntimeError("No available kernel. Aborting execution.")
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = scores.masked_fill(~attn_mask, -torch.inf)
    output, _ = torch.ops.aten._scaled_dot_product_attention_math(
        *(query, key, value, attn_mask, dropout_p, is_causal, None),
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return output


def flash_serves(params: tuple[Any, ...]) -> bool:
    """What `can_use_flash_attention` says on a recent GPU."""
    query, _, value, mask, *_ = params
    sizes = {query.shape[-1], value.shape[-1]}
    return mask is None and query.dtype != torch.float32 and len(sizes) == 1 and max(sizes) <= 256


def flex_attention(
    query,
    key,
    value,
    score_mod=None,
    block_mask=None,
    scale=None,
    enable_gqa=False,
    kernel_options=None,
    return_aux=None,
):
    """Scores of all pairs, of which those in blocks that the mask lists count."""
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    assert block_mask.seq_lengths == (query.shape[2], key.shape[2])
    with unwatched():
        q, k = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
        at = (torch.zeros((), dtype=torch.int64, device=query.device),) * 2
        at += (q[:, None], k[None])
        visible = _visible(block_mask, at)
        k, v = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query.float() @ k.transpose(2, 3) * scale
        if score_mod is not None:
            scores = score_mod(scores, *at)
        scores = scores.masked_fill(~visible, -torch.inf)
        output = (scores.softmax(-1) @ v).to(query.dtype)
    if return_aux is None:
        return output
    return output, SimpleNamespace(lse=scores.logsumexp(-1))


def _visible(mask: Any, at: tuple[Tensor, ...]) -> Tensor:
    """`[N, N]` bool. Backward reads other lists, which must say the same."""
    n = at[2].shape[0]

    def blocks(numbers: Tensor, indices: Tensor) -> Tensor:
        rows = list(zip(numbers[0, 0].tolist(), indices[0, 0].tolist(), strict=True))
        dense = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        for row, (number, columns) in enumerate(rows):
            dense[row, columns[:number]] = True
        dense = dense.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
        return dense[:n, :n].to(numbers.device)

    full = blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = blocks(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(blocks(mask.full_q_num_blocks, mask.full_q_indices).T, full)
    assert torch.equal(blocks(mask.q_num_blocks, mask.q_indices).T, partial)
    return full | (partial & mask.mask_mod(*at))
