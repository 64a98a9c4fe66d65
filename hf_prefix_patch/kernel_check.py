"""The check of a backend's kernel on a CUDA device, once per process and kind of call.

Kernels differ by GPU generation, torch version and head size in ways no version number tells: a
mask aligned top-left, or grouped queries read as if they were not, gives plausible numbers.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_prefix_patch.backends.base import Backend, Needs
from hf_prefix_patch.reference import duplicated_rows_attention
from hf_prefix_patch.tree import PrefixTree

# Largest error of output and gradients, relative to their norm: a few units of the type's rounding,
# and fp32 as TF32 computes it. A wrong alignment is off by a good part of 1.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE_FP32 = 1e-2

_faults: dict[tuple[Any, ...], str | None] = {}


def kernel_fault(backend: Backend, needs: Needs) -> str | None:
    """What is wrong with the backend's kernel on this device; None if nothing is.

    Looks on CUDA devices only; remembered for the process.
    """
    if needs.device.type != "cuda":
        return None
    index = torch.cuda.current_device() if needs.device.index is None else needs.device.index
    called = needs.dtype, needs.implementation, needs.head_dims, needs.features
    key = (backend, index, *called, needs.kernels, needs.flash_impl)
    if key not in _faults:
        _faults[key] = find_fault(backend, needs)
    return _faults[key]


def find_fault(backend: Backend, needs: Needs) -> str | None:
    """Run the backend on a small tree and compare with dense attention in fp32.

    Unequal lengths, several branches, grouped queries, a window, soft cap and sinks where the
    model has them; output and the gradients of queries, keys and values.
    """
    no_autocast = torch.autocast(needs.device.type, enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), no_autocast:
            errors = _errors(backend, needs)
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel
    except Exception as error:  # whatever a kernel or its compiler raises
        return f"it does not run on {_name(needs.device)} ({type(error).__name__}: {error})"
    tolerance = _TOLERANCE.get(needs.dtype, _TOLERANCE_FP32)
    if all(error <= tolerance for error in errors.values()):
        return None
    found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return (
        f"it computes wrong results on {_name(needs.device)} (relative errors: {found}; "
        f"{tolerance:.0e} is allowed)"
    )


def _errors(backend: Backend, needs: Needs) -> dict[str, float]:
    tree = _tree().to(needs.device)
    windows: set[int | None] = {None if window is None else 37 for window in needs.windows}
    planned = backend.plan(tree, replace(needs, windows=frozenset(windows)))
    kwargs = tree.model_kwargs() | planned
    errors: dict[str, float] = {}
    for size in sorted(needs.head_dims):
        for window in windows:
            inputs, direction = _inputs(tree, size, needs)
            options: dict[str, Any] = {
                "scaling": size**-0.5,
                "sliding_window": window,
                "softcap": 5.0 if "softcap" in needs.features else None,
                "s_aux": inputs[3] if "sinks" in needs.features else None,
            }
            module = AttentionStandIn(needs)
            got = backend.attend(module, *inputs[:3], dropout=0.0, **options, **kwargs)
            exact = [x.detach().float().requires_grad_() for x in inputs]
            if options["s_aux"] is not None:
                options["s_aux"] = exact[3]
            want = duplicated_rows_attention(tree, *exact[:3], **options)
            pairs = {"output": (got, want)}
            ours = torch.autograd.grad(got, inputs[:3], direction.to(got.dtype))
            theirs = torch.autograd.grad(want, exact[:3], direction)
            pairs |= zip(("dq", "dk", "dv"), zip(ours, theirs, strict=True), strict=True)
            for name, (a, b) in pairs.items():
                error = ((a.float() - b).norm() / b.norm()).item()
                errors[name] = max(errors.get(name, 0.0), error if error == error else torch.inf)
    return errors


def _tree() -> PrefixTree:
    """Three rows of one prompt, two of which go on together, and a row of its own."""
    start, more = list(range(150)), list(range(500, 570))
    rows = [start + more + [1] * 90, start + more + [2] * 3, start + [3] * 141, [4] * 33]
    length = max(map(len, rows))
    ids = [row + [0] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return PrefixTree.from_rows(ids, mask)


def _inputs(tree: PrefixTree, size: int, needs: Needs) -> tuple[list[Tensor], Tensor]:
    """Six query heads and two of keys and values, sinks, and a direction for backward."""
    generator = torch.Generator().manual_seed(size)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(needs.device)

    n = tree.packed_tokens
    inputs = drawn(1, 6, n, size), drawn(1, 2, n, size), drawn(1, 2, n, size), drawn(6)
    return [x.to(needs.dtype).requires_grad_() for x in inputs], drawn(1, n, 6, size)


class AttentionStandIn(nn.Module):
    """Stands for an attention module where a backend asks for its config."""

    def __init__(self, needs: Needs) -> None:
        super().__init__()
        original = SimpleNamespace(_attn_implementation=needs.implementation)
        self.config: Any = SimpleNamespace(prefix_sharing_original=original)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
