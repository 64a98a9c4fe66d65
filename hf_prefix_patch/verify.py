"""The check at enable time: a small random batch, shared against unshared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.composite import decoder_of
from hf_prefix_patch.hooks import BackbonePatch, patch_of
from hf_prefix_patch.stats import SharingStats
from hf_prefix_patch.support import has_experts

# Largest error of a token's hidden state, relative to its norm: in half precision four times the
# model's own rounding noise, within these bounds. The noise is what the rows differ by when they
# stand one column further right, where rotary embeddings round differently. A response that sees
# another branch is off by a part of its attention output. fp64 is held to fp32's: transformers
# computes norms and rotary angles in fp32.
TOLERANCE = {torch.float16: (5e-3, 2e-2), torch.bfloat16: (3e-2, 1e-1)}
TOLERANCE_FP32 = (1e-3, 1e-3)

# Two pairs: prompt, chosen and rejected lengths. The first is padded right, the second left, where
# rows share only if they start in the same column.
_RIGHT, _LEFT = (9, 4, 7), (8, 5, 5)
_PADDED_RIGHT = 2  # rows
_RESPONSE = 9  # tokens of a row from here on belong to its response


def verify_sharing(backbone: PreTrainedModel) -> None:
    """Compare a patched decoder stack with itself unpatched.

    Training flags, random state, gradients and counters are left alone.

    Raises:
        RuntimeError: the packed path did not run, or a token differs by more than the tolerance of
            the model's dtype.
        NotImplementedError: a layer asks its attention function for what no backend serves.
    """
    patch = patch_of(backbone)
    assert patch is not None
    ids, mask = _random_pairs(backbone)
    if patch.sees_padding:  # such a batch runs as it is
        ids, mask = ids[:_PADDED_RIGHT], mask[:_PADDED_RIGHT]
    with torch.no_grad(), _evaluating(backbone), _scratch_stats(patch) as stats:
        shared = _shared_hidden(backbone, ids, mask)
        calls, bypassed = stats.calls, dict(stats.bypassed)
        unshared = _hidden(backbone, ids, mask, use_cache=True)  # a cache is always bypassed
        moved_ids, moved_mask = F.pad(ids, (1, 0)), F.pad(mask, (1, 0))
        moved = _hidden(backbone, moved_ids, moved_mask, use_cache=True)[:, 1:]
    name = type(backbone).__name__
    if not calls:
        raise RuntimeError(
            f"verification of prefix sharing failed: {name} did not run on the packed row "
            f"(bypassed: {bypassed}); the model was restored"
        )
    error = _error(shared, unshared)
    rows = [row[real] for row, real in zip(error, mask.bool(), strict=True)]
    dtype = patch.selection(backbone).needs.dtype
    # Routing is discontinuous: in half precision rounding may send single tokens to other experts.
    routed = dtype in TOLERANCE and has_experts(decoder_of(backbone).config)
    worst = max((row[_RESPONSE:].median() if routed else row.max()).item() for row in rows)
    least, most = TOLERANCE.get(dtype, TOLERANCE_FP32)
    noise = _error(moved, unshared)[mask.bool()].max().item()
    tolerance = max(least, min(4 * noise, most))  # least, if padding makes the model itself NaN
    if not worst <= tolerance:
        raise RuntimeError(
            f"verification of prefix sharing failed: hidden states of {name} differ from the "
            f"unshared ones by {worst:.2e} of their norm, where {dtype} allows "
            f"{tolerance:.0e}; the model was restored. It takes positions from the mask, or "
            "something beside attention looks across the tokens of a row; run it unpatched."
        )


def _error(got: Tensor, want: Tensor) -> Tensor:
    """`[R, L]`, of each token's hidden state relative to its norm."""
    error: Tensor = (got - want).double().norm(dim=-1) / want.double().norm(dim=-1)
    return error


def _random_pairs(backbone: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """`[4, L]` ids and attention mask: chosen and rejected of a right- and a left-padded pair."""
    decoder = decoder_of(backbone)
    weight = next(decoder.parameters())
    if weight.is_meta:
        raise RuntimeError(
            "the model's weights are on the meta device, so sharing cannot be verified; load them "
            "first or pass verify=False"
        )
    length = max(map(sum, ((p, max(c, r)) for p, c, r in (_RIGHT, _LEFT)))) + 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, decoder.config.vocab_size, (4, length), generator=generator, device="cpu"
    )
    mask = torch.zeros_like(ids)
    prompt, chosen, rejected = _RIGHT
    ids[1, :prompt] = ids[0, :prompt]
    mask[0, : prompt + chosen] = mask[1, : prompt + rejected] = 1
    prompt, chosen, _ = _LEFT
    start = length - prompt - chosen
    ids[3, start : start + prompt] = ids[2, start : start + prompt]
    mask[2:, start:] = 1
    return ids.to(weight.device), mask.to(weight.device)


def _shared_hidden(backbone: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    try:
        return _hidden(backbone, ids, mask, use_cache=False)
    except NotImplementedError:  # a refusal of our own, and a RuntimeError to Python
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise RuntimeError(
            f"verification of prefix sharing failed: {type(backbone).__name__} does not run on a "
            f"packed row ({error}); the model was restored. Its layers do not call transformers' "
            "attention registry, or read the attention mask themselves; run it unpatched."
        ) from error


def _hidden(backbone: PreTrainedModel, ids: Tensor, mask: Tensor, use_cache: bool) -> Tensor:
    hidden: Tensor = backbone(input_ids=ids, attention_mask=mask, use_cache=use_cache)[0]
    return hidden


@contextmanager
def _evaluating(backbone: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode; training flags and the state of dynamic rotary embeddings come back."""
    flags = [(module, module.training) for module in backbone.modules()]
    rotary = [
        (module, dict(module.__dict__), dict(module._buffers))
        for module in backbone.modules()
        if hasattr(module, "max_seq_len_cached")
    ]
    backbone.train(False)
    try:
        yield
    finally:
        for module, attributes, buffers in rotary:
            module.__dict__.update(attributes)
            module._buffers.update(buffers)
        for module, training in flags:
            module.training = training


@contextmanager
def _scratch_stats(patch: BackbonePatch) -> Iterator[SharingStats]:
    """Count on a scratch copy, and keep quiet."""
    stats, on_bypass = patch.stats, patch.on_bypass
    patch.stats, patch.on_bypass = SharingStats(), "ignore"
    try:
        yield patch.stats
    finally:
        patch.stats, patch.on_bypass = stats, on_bypass
