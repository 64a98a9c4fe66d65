"""Whether a model type is shared, and by how much its results differ from the unpatched model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from batches import Batch, preference_batch, run
from tiny_types import VOCABULARY, tiny_model_of
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch import PrefixTree, enable_prefix_sharing
from hf_prefix_patch.hooks import patch_of
from hf_prefix_patch.plans import Plan
from hf_prefix_patch.selection import needs_of, structure_of

SHARED, REFUSED, VERIFICATION = "shared", "refused", "refused by verification"
WRONG, BROKEN, NOT_BUILT = "wrong", "not checked", "not built"
KINDS = (SHARED, REFUSED, VERIFICATION, NOT_BUILT, WRONG, BROKEN)

PADDINGS = ("right", "left")

IN_ONE_ROW: dict[str, Any] = {"one_row": True, "use_cache": False}

TOLERANCE = 2e-5
"""Of a row's log-prob, relative to one more than its size, and of a gradient, relative to the
largest entry of the model's gradients."""

LEAST_LEAK = 100 * TOLERANCE
"""What a plan in which rows see each other must change at least, in each of these measures; less
would be a comparison that cannot fail."""


@dataclass(frozen=True)
class Status:
    """What became of a model type.

    Attributes:
        detail: why it is not shared, or what of it is not.
        outcome: what would have become of it without verification.
        logps, gradients: the largest errors, in the units of `TOLERANCE`.
        leak: the least change of a row's log-prob when rows see each other.
        documents: of several in one row: "shared", "as they are", or nothing.
    """

    model_type: str
    kind: str
    detail: str = ""
    logps: float = math.nan
    gradients: float = math.nan
    leak: float = math.nan
    documents: str = ""
    outcome: str = ""


def status_of(model_type: str, **changes: Any) -> Status:
    """Build a tiny model of the type, enable sharing on it and compare it with itself unpatched."""
    try:
        model = tiny_model_of(model_type, **changes)
    except Exception as error:
        return Status(model_type, NOT_BUILT, _told(error))
    try:
        enable_prefix_sharing(model).remove()
    except NotImplementedError as error:
        return Status(model_type, REFUSED, _told(error))
    except RuntimeError as error:
        outcome = _without_verification(model)
        return Status(model_type, VERIFICATION, _told(error), outcome=outcome)
    return compared(model_type, model)


def compared(model_type: str, model: PreTrainedModel, verify: bool = True) -> Status:
    """Log-probs of all rows and gradients, shared against unpatched, padded right and left, and as
    documents in one row, if the model runs on those."""
    batches = [preference_batch(padding, vocab=VOCABULARY) for padding in PADDINGS]
    try:
        wanted = [run(model, batch) for batch in batches]
    except Exception as error:
        return Status(model_type, NOT_BUILT, f"the unpatched model does not run: {_told(error)}")
    if not all(map(_finite, wanted)):
        return Status(model_type, NOT_BUILT, "the unpatched model computes NaN")
    errors, leaks, notes = [], [], []
    in_one_row, documents, of_documents = None, "", 0.0
    with suppress(Exception):
        in_one_row = run(model, batches[0], **IN_ONE_ROW)
    with enable_prefix_sharing(model, verify=verify, on_bypass="ignore") as sharing:
        for padding, batch, want in zip(PADDINGS, batches, wanted, strict=True):
            sharing.stats.bypassed.clear()
            got = _packed_run(model, batch)
            if sharing.stats.bypassed:
                notes.append(f"padded {padding}, bypassed: {', '.join(sharing.stats.bypassed)}")
                continue
            errors.append(differences(got, want))
            with _packed_calls(model, _leaking):
                leaks.append(differences(run(model, batch), want))
        if in_one_row is not None:
            sharing.stats.bypassed.clear()
            logps, gradient = differences(_packed_run(model, batches[0], **IN_ONE_ROW), in_one_row)
            documents = "as they are" if sharing.stats.bypassed else "shared"
            of_documents = max(logps.max().item(), gradient)
    if not errors:
        return Status(model_type, REFUSED, "; ".join(notes))
    rows, gradients = [e[0].max().item() for e in errors], [e[1] for e in errors]
    # Two pairs: the row that comes second in each sees the other one.
    leak = min(rows.sort(descending=True).values[1].item() for rows, _ in leaks)
    figures = max(rows), max(gradients), leak, documents
    if not of_documents <= TOLERANCE:
        return Status(model_type, WRONG, "documents in one row differ", *figures)
    if not max(*rows, *gradients) <= TOLERANCE:
        return Status(model_type, WRONG, "results differ", *figures)
    if not min(leak, *(gradient for _, gradient in leaks)) >= LEAST_LEAK:
        return Status(model_type, WRONG, "the comparison could not have failed", *figures)
    return Status(model_type, SHARED, "; ".join(notes), *figures)


def differences(
    got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]
) -> tuple[Tensor, float]:
    """`[R]` of each row's log-prob, and of the gradients, in the units of `TOLERANCE`; infinite
    where they cannot be compared."""
    rows = (got[0] - want[0]).abs() / (1 + want[0].abs())
    if got[1].keys() != want[1].keys():
        return rows, math.inf
    largest = max(gradient.abs().max().item() for gradient in want[1].values())
    worst = max((got[1][n] - g).abs().max().item() for n, g in want[1].items())
    return rows.nan_to_num(nan=math.inf), worst / largest if math.isfinite(worst) else math.inf


def _packed_run(
    model: PreTrainedModel, batch: Batch, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """A run with the proof that the stack ran on the packed row alone, if it is not bypassed."""
    patch = next(filter(None, map(patch_of, model.modules())))
    before, seen = patch.stats.packed_tokens, []

    def note(stack: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = kwargs.get("input_ids")
        seen.append((kwargs["inputs_embeds"] if given is None else given).shape[:2])
        return kwargs

    with _packed_calls(model, note):
        got = run(model, batch, **options)
    if not patch.stats.bypassed:
        packed = patch.stats.packed_tokens - before
        assert packed < batch.attention_mask.sum()
        assert seen == [(1, packed)], f"the stack saw {seen}"
    return got


@contextmanager
def _packed_calls(
    model: PreTrainedModel, see: Callable[[PreTrainedModel, dict[str, Any]], dict[str, Any]]
) -> Iterator[None]:
    """Look at the arguments of packed calls, and change them."""

    def hook(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args, see(stack, kwargs)) if "tree_backend" in kwargs else None

    stacks = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    hooks = [stack.register_forward_pre_hook(hook, with_kwargs=True) for stack in stacks]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _leaking(stack: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The wrong plan, for a comparison that must fail: each token of the packed row sees all that
    stand before it."""
    positions = kwargs["position_ids"]
    length = positions.shape[-1]
    bounds = torch.tensor([0, length])
    tree = PrefixTree.from_descriptors(positions, torch.arange(length), bounds, bounds)
    needs = needs_of(stack, structure_of(stack))
    planned = Plan(tree, None).backend_kwargs(kwargs["tree_backend"], needs)
    return {**kwargs, **tree.model_kwargs(), "position_ids": positions, **planned}


def _without_verification(model: PreTrainedModel) -> str:
    """What would have become of a model that verification keeps from being shared."""
    try:
        status = compared("", model, verify=False)
    except Exception as error:
        return f"Without verification a call raises {type(error).__name__}."
    if status.kind == NOT_BUILT:
        return f"Without verification: {status.detail}"
    return f"Without verification it is {status.kind}: log-probs differ by {status.logps:.0e}."


def _finite(result: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return all(bool(x.isfinite().all()) for x in (result[0], *result[1].values()))


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
