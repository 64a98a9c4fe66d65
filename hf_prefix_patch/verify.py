"""The check at enable time: a small random batch, shared against unshared."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix_patch.backends.base import Backend
from hf_prefix_patch.composite import decoder_of
from hf_prefix_patch.documents import Trial
from hf_prefix_patch.features import has_experts, is_bitsandbytes
from hf_prefix_patch.hooks import BackbonePatch, patch_of
from hf_prefix_patch.modes import evaluating, uncompiled
from hf_prefix_patch.selection import Seen
from hf_prefix_patch.sharded import whole_weights
from hf_prefix_patch.stats import SharingStats
from hf_prefix_patch.wrappers import device_of, unwrap

# Largest error of a token's hidden state, relative to its norm: in half precision four times the
# model's own rounding noise, within these bounds. The noise is what the rows differ by when they
# stand one column further right, where rotary embeddings round differently. A response that sees
# another branch is off by a part of its attention output. fp64 is held to fp32's: transformers
# computes norms and rotary angles in fp32.
TOLERANCE = {torch.float16: (5e-3, 2e-2), torch.bfloat16: (3e-2, 1e-1)}
TOLERANCE_FP32 = (1e-3, 1e-3)

# Largest change of a token's hidden state, relative to its norm, by what the document before its
# own holds, in any dtype: what is computed of the token is the same. Of 113 model types those that
# keep documents apart stay below 2e-7, the others above 1e-4, with weights a tenth as large too.
# In fp16 experts may round by how many tokens they have, and are then taken for one of the others.
_LEAK = 1e-5

# Two pairs: prompt, chosen and rejected lengths. The first is padded right, the second left, where
# rows share only if they start in the same column.
_RIGHT, _LEFT = (9, 4, 7), (8, 5, 5)
_PADDED_RIGHT = 2  # rows
_RESPONSE = 9  # tokens of a row from here on belong to its response


def verify_sharing(called: nn.Module, backbone: PreTrainedModel) -> None:
    """Compare a patched decoder stack with itself unpatched, and find out whether that keeps
    documents in one row apart.

    Training flags, random state, gradients and counters are left alone, nothing is compiled, and
    sharded weights are sharded again.

    Args:
        called: what the user calls: the model itself or what wraps it, which may gather weights,
            move inputs or switch autocast on.
        backbone: the decoder stack in it, whose output is compared.

    Raises:
        RuntimeError: the packed path did not run, or a token differs by more than the tolerance of
            the model's dtype.
        ValueError: the unpatched model returns NaN or infinity.
        NotImplementedError: a layer asks its attention function for what no backend serves.
    """
    patch = patch_of(backbone)
    assert patch is not None
    patch.trial = None  # without one, calls with documents run as they are
    ids, mask = _random_pairs(backbone)
    if patch.sees_padding:  # such a batch runs as it is
        ids, mask = ids[:_PADDED_RIGHT], mask[:_PADDED_RIGHT]
    calls = _Calls(called, backbone)
    with (
        torch.no_grad(),
        evaluating(called),
        uncompiled(),
        whole_weights(called),
        _scratch_stats(patch) as stats,
    ):
        # A cache is always bypassed.
        unshared = calls.hidden(ids, attention_mask=mask, use_cache=True)
        if calls.seen is not None:
            raise RuntimeError(
                f"sharing cannot be verified: {type(called).__name__} does not hand use_cache=True "
                "on to its model, so no call of it runs unshared; pass the model inside, or "
                "verify=False"
            )
        stats.bypassed.clear()  # of this one, which was meant to be
        shared = _shared_hidden(calls, patch, ids, mask)
        seen, bypassed = calls.seen, dict(stats.bypassed)
        behind = _behind_others(calls, ids[1, mask[1] != 0])
        # Last: longer rows change dynamic rotary frequencies.
        moved_mask = F.pad(mask, (1, 0))
        moved = calls.hidden(F.pad(ids, (1, 0)), attention_mask=moved_mask, use_cache=True)[:, 1:]
    if seen is None:
        raise RuntimeError(
            f"verification of prefix sharing failed: {calls.name} did not run on the packed row "
            f"(bypassed: {bypassed}), but must, to be compared; the model was restored; mend what "
            "bypasses it, or run it unpatched"
        )
    real = mask.cpu().bool()
    # Padding alone can make rows of the model itself NaN: eager attention in fp64, before a row.
    known = [r for r, cells in enumerate(real) if bool(unshared[r, cells].isfinite().all())]
    if not known:
        raise ValueError(
            f"hidden states of the unshared {calls.name} are NaN or infinite for random tokens, "
            "but must be finite to compare with; check its weights for NaN and its dtype (float16 "
            "overflows where bfloat16 does not), or pass verify=False"
        )
    dtype = compute_precision(backbone, seen.dtype)
    # Routing is discontinuous: in half precision rounding may send single tokens to other experts.
    routed = dtype in TOLERANCE and has_experts(decoder_of(backbone).config)
    error = _error(shared, unshared)
    worst = torch.stack([_of_row(error[r, real[r]], routed) for r in known]).max().item()
    least, most = TOLERANCE.get(dtype, TOLERANCE_FP32)
    noise = _error(moved, unshared)[real].max().item()
    tolerance = max(least, min(4 * noise, most))  # least, if padding makes the model itself NaN
    if not worst <= tolerance:  # NaN, if one is
        raise RuntimeError(
            f"verification of prefix sharing failed: hidden states of {calls.name} differ from the "
            f"unshared ones by {worst:.2e} of their norm, where {dtype} allows "
            f"{tolerance:.0e}; the model was restored. It takes positions from the mask, or "
            "something beside attention looks across the tokens of a row; run it unpatched."
        )
    apart = (
        behind is not None
        and bool(_error(*behind).max() <= _LEAK)
        and bool(_of_row(_error(behind[0], unshared[1, real[1]]), routed) <= tolerance)
    )
    patch.trial = Trial(decoder_of(backbone).config._attn_implementation, apart)


def head_chooses_logits(model: nn.Module, backbone: PreTrainedModel) -> bool:
    """Whether a model takes `logits_to_keep`, and its stack knows nothing of that."""
    stacks = model, backbone, decoder_of(backbone)
    head, *rest = ("logits_to_keep" in inspect.signature(x.forward).parameters for x in stacks)
    return head and not any(rest)


class _Calls:
    """Calls of the outermost module, of which the decoder stack's output is read.

    Attributes:
        seen: what shared calls have shown of device and dtype; None if none was shared.
        name: class of the decoder stack.
    """

    def __init__(self, called: nn.Module, backbone: PreTrainedModel) -> None:
        self._called, self._backbone = called, backbone
        self._found: list[Tensor] = []
        self._ran = False
        self._backend: Backend | None = None
        self.seen: Seen | None = None
        self.name = type(backbone).__name__
        # A head gives the logits of one position where it can, as nobody looks at them.
        chooses = head_chooses_logits(unwrap(called, check=False), backbone)
        self._options = {"logits_to_keep": 1} if chooses else {}

    def hidden(self, ids: Tensor, **inputs: Any) -> Tensor:
        """`[R, L, H]` on the host: not every device has fp64, in which they are compared."""
        self._found.clear()
        self._ran = False
        decoder = decoder_of(self._backbone)
        with ExitStack() as hooks:  # one goes even if Ctrl-C comes while another does
            hooks.callback(decoder.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            hooks.callback(self._backbone.register_forward_hook(self._after).remove)
            self._call({"input_ids": ids, **inputs})
        if len(self._found) != 1:
            raise RuntimeError(
                f"{type(self._called).__name__} called its decoder stack {len(self._found)} times "
                "for one batch, so sharing cannot be verified; pass verify=False"
            )
        hidden = self._found[0]
        if hidden.shape[:2] != ids.shape or hidden.ndim != 3:
            raise RuntimeError(
                f"sharing cannot be verified: {self.name} returns a tensor of shape "
                f"{list(hidden.shape)} for rows of {list(ids.shape)}, but a decoder stack returns "
                "hidden states [R, L, H] first; pass the model that has one under its "
                "base_model_prefix"
            )
        return hidden.cpu()

    def _call(self, inputs: dict[str, Any]) -> None:
        try:
            self._called(**inputs, **self._options)
        except Exception as error:
            # What a head makes of this batch is not ours to judge; without pad_token_id it raises.
            if not self._found and isinstance(error, TypeError) and not self._ran:
                raise RuntimeError(
                    f"sharing cannot be verified: {type(self._called).__name__} does not take what "
                    f"a model takes ({error}); pass the module that training calls with input_ids, "
                    "or verify=False"
                ) from error
            if not self._found:
                raise

    def outdated(self, patch: BackbonePatch) -> bool:
        """Whether the next call will have another backend than the last, from what that showed."""
        if self.seen is None:
            return False
        return patch.selection(self._backbone, self.seen).backend != self._backend

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ran = True
        if kwargs.get("tree_seen") is not None:
            self.seen, self._backend = kwargs["tree_seen"], kwargs["tree_backend"]

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._found.append(output[0])


def _error(got: Tensor, want: Tensor) -> Tensor:
    """`[R, L]`, of each token's hidden state relative to its norm; none where both are zero."""
    error: Tensor = (got - want).double().norm(dim=-1)
    return torch.where(error == 0, error, error / want.double().norm(dim=-1))


def _of_row(error: Tensor, routed: bool) -> Tensor:
    """What is judged of the errors `[T]` of a row's tokens."""
    return error[_RESPONSE:].median() if routed else error.max()


def compute_precision(backbone: PreTrainedModel, dtype: torch.dtype) -> torch.dtype:
    """The coarsest dtype that the model computes in: layers of bitsandbytes have one of their own,
    and 8-bit ones round activations to no more digits than bfloat16 has."""
    layers = (module for module in backbone.modules() if is_bitsandbytes(module))
    found = {dtype, *(getattr(layer, "compute_dtype", torch.bfloat16) for layer in layers)}
    return next((half for half in (torch.bfloat16, torch.float16) if half in found), dtype)


def _random_pairs(backbone: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """`[4, L]` ids and attention mask: chosen and rejected of a right- and a left-padded pair."""
    decoder = decoder_of(backbone)
    device = device_of(decoder)
    if device.type == "meta":
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
    return ids.to(device), mask.to(device)


def _shared_hidden(calls: _Calls, patch: BackbonePatch, ids: Tensor, mask: Tensor) -> Tensor:
    """Of the backend that is picked once a call has shown what attention computes in."""
    for last in (False, True):
        try:
            shared = calls.hidden(ids, attention_mask=mask, use_cache=False)
            if last or not calls.outdated(patch):
                break
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if not last and calls.outdated(patch):
                continue
            # A refusal of our own, or nothing that the model or its layers are to blame for.
            if isinstance(error, NotImplementedError | torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                f"verification of prefix sharing failed: {calls.name} does not run on a packed row "
                f"({error}); the model was restored. Its layers do not call transformers' "
                "attention registry, do not hand keyword arguments on to it, or read the attention "
                "mask themselves; run it unpatched."
            ) from error
    return shared


def _behind_others(calls: _Calls, document: Tensor) -> list[Tensor] | None:
    """`[T, H]` of a document of `[T]` tokens behind one document and behind another, in a row
    without a mask; None if the model cannot be called so."""
    positions = torch.arange(len(document), device=document.device).repeat(2)
    rows = [torch.cat([other, document]) for other in (document, document.flip(0))]
    try:
        hidden = [
            calls.hidden(ids[None], position_ids=positions[None], use_cache=False) for ids in rows
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever it is, such calls will run as they are
        return None
    return [x[0, len(document) :] for x in hidden]


@contextmanager
def _scratch_stats(patch: BackbonePatch) -> Iterator[SharingStats]:
    """Count on a scratch copy, and keep quiet."""
    with ExitStack() as restore:
        restore.callback(setattr, patch, "stats", patch.stats)
        restore.callback(setattr, patch, "on_bypass", patch.on_bypass)
        patch.stats, patch.on_bypass = SharingStats(), "ignore"
        yield patch.stats
