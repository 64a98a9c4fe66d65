"""The check at enable time: a small random batch, shared against unshared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.hooks import BackbonePatch, patch_of
from hf_prefix_patch.stats import SharingStats
from hf_prefix_patch.support import has_experts, layer_types, sliding_window

# Largest error of a token's hidden state, relative to its norm. Rounding stays one or two orders of
# magnitude below; a response that sees another branch is off by a part of its attention output.
# fp64 is held to fp32's: transformers computes norms and rotary angles in fp32.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
TOLERANCE_FP32 = 1e-3

# Two pairs: prompt, chosen and rejected lengths. The first is padded right, the second left, where
# rows share only if they start in the same column.
_RIGHT, _LEFT = (9, 4, 7), (8, 5, 5)
_RESPONSE = 9  # tokens of a row from here on belong to its response


def verify_sharing(backbone: PreTrainedModel) -> None:
    """Compare a patched decoder stack with itself unpatched.

    Training flags, random state, gradients and counters are left alone.

    Raises:
        RuntimeError: the packed path did not run, or a token differs by more than the tolerance of
            the model's dtype.
        NotImplementedError: a layer hands on another sliding window than the config says.
    """
    patch = patch_of(backbone)
    assert patch is not None
    ids, mask = _random_pairs(backbone)
    windows: list[int | None] = []
    with torch.no_grad(), _evaluating(backbone), _recording(patch, windows) as stats:
        shared = _hidden(backbone, ids, mask, use_cache=False)
        calls, bypassed = stats.calls, dict(stats.bypassed)
        unshared = _hidden(backbone, ids, mask, use_cache=True)  # a cache is always bypassed
    name = type(backbone).__name__
    if not calls or not windows:
        raise RuntimeError(
            f"verification of prefix sharing failed: the layers of {name} did not run shared "
            f"attention on the packed row (bypassed: {bypassed}); the model was restored"
        )
    _check_windows(backbone, windows)
    error = (shared - unshared).double().norm(dim=-1) / unshared.double().norm(dim=-1)
    rows = [row[real] for row, real in zip(error, mask.bool(), strict=True)]
    # Routing is discontinuous: in half precision rounding may send single tokens to other experts.
    routed = unshared.dtype in TOLERANCE and has_experts(backbone.config)
    worst = max((row[_RESPONSE:].median() if routed else row.max()).item() for row in rows)
    tolerance = TOLERANCE.get(unshared.dtype, TOLERANCE_FP32)
    if not worst <= tolerance:
        raise RuntimeError(
            f"verification of prefix sharing failed: hidden states of {name} differ from the "
            f"unshared ones by {worst:.2e} of their norm, where {unshared.dtype} allows "
            f"{tolerance:.0e}; the model was restored. Its layers use something beside attention "
            "that looks across the tokens of a row; run it unpatched."
        )


def _random_pairs(backbone: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """`[4, L]` ids and attention mask: chosen and rejected of a right- and a left-padded pair."""
    weight = next(backbone.parameters())
    if weight.is_meta:
        raise RuntimeError(
            "the model's weights are on the meta device, so sharing cannot be verified; load them "
            "first or pass verify=False"
        )
    length = max(map(sum, ((p, max(c, r)) for p, c, r in (_RIGHT, _LEFT)))) + 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, backbone.config.vocab_size, (4, length), generator=generator)
    mask = torch.zeros_like(ids)
    prompt, chosen, rejected = _RIGHT
    ids[1, :prompt] = ids[0, :prompt]
    mask[0, : prompt + chosen] = mask[1, : prompt + rejected] = 1
    prompt, chosen, _ = _LEFT
    start = length - prompt - chosen
    ids[3, start : start + prompt] = ids[2, start : start + prompt]
    mask[2:, start:] = 1
    return ids.to(weight.device), mask.to(weight.device)


def _hidden(backbone: PreTrainedModel, ids: Tensor, mask: Tensor, use_cache: bool) -> Tensor:
    hidden: Tensor = backbone(input_ids=ids, attention_mask=mask, use_cache=use_cache)[0]
    return hidden


def _check_windows(backbone: PreTrainedModel, windows: list[int | None]) -> None:
    """Hold the windows that reached shared attention against the config.

    The unpatched model may put a window into its mask alone, which a short batch cannot show.
    """
    window = sliding_window(backbone.config)
    types = layer_types(backbone.config)
    expected = [window if kind == "sliding_attention" else None for kind in types]
    if windows != expected:
        raise NotImplementedError(
            f"prefix sharing refused: the layers of {type(backbone).__name__} passed sliding "
            f"windows {windows} to their attention function, but the config says {expected}"
        )


@contextmanager
def _evaluating(backbone: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, every module's own training flag restored afterwards."""
    flags = [(module, module.training) for module in backbone.modules()]
    backbone.train(False)
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _recording(patch: BackbonePatch, windows: list[int | None]) -> Iterator[SharingStats]:
    """Count and warn on a scratch copy, and note the sliding window of every attention call."""
    backend, stats, on_bypass = patch.backend, patch.stats, patch.on_bypass

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        windows.append(kwargs["sliding_window"])
        return backend.attend(*args, **kwargs)

    patch.backend, patch.stats = replace(backend, attend=attend), SharingStats()
    patch.on_bypass = "ignore"
    try:
        yield patch.stats
    finally:
        patch.backend, patch.stats, patch.on_bypass = backend, stats, on_bypass
