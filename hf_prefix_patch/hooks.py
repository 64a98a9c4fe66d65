"""The two hooks on a decoder stack: rows in, packed row through the layers, rows out.

A call that is given a packed row runs on it as it is and gets a packed row back.

The hooks are plain functions that find their state on the module they are called with, so that a
deep copy of a model runs its own weights. What a call needs travels in its keyword arguments:
checkpointed layers run again in backward, when any state outside the call has moved on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.attention import EMPTY_MASK
from hf_prefix_patch.backends.base import Needs
from hf_prefix_patch.bypass import CACHE_BY_DEFAULT, advice, bypass_reason
from hf_prefix_patch.composite import CALL, PlannedCall, decoder_of, pack_embeddings
from hf_prefix_patch.config_views import Views
from hf_prefix_patch.documents import (
    Trial,
    boundaries_agree,
    documents_reason,
    without_boundaries,
)
from hf_prefix_patch.features import learned_positions, rope_depends_on_length
from hf_prefix_patch.guards import ask_in_backward, check_embedded, check_tensors, not_packed
from hf_prefix_patch.hooking import by_name, untraced
from hf_prefix_patch.media import Shown, media_of
from hf_prefix_patch.notices import warn_caller
from hf_prefix_patch.outputs import unpack_output
from hf_prefix_patch.packed import is_packed, take_packed
from hf_prefix_patch.planned import plain, plan_of
from hf_prefix_patch.plans import NOTHING_TO_GAIN, ROW_INPUTS, Plan, forget, recall_plan
from hf_prefix_patch.recurrent import TreeRecurrence, recurrence_of
from hf_prefix_patch.selection import (
    Seen,
    Selection,
    State,
    needs_of,
    select,
    state_of,
    structure_of,
)
from hf_prefix_patch.stats import SharingStats
from hf_prefix_patch.towers import expect, unhook_towers
from hf_prefix_patch.tree import PrefixTree
from hf_prefix_patch.wrappers import backbone_of, unwrap

OnBypass = Literal["warn", "ignore", "raise"]
BeforeFirstCall = Callable[[PreTrainedModel], None]
"""Of a decoder stack; may take the patch off. A function of a module, to be copied and pickled."""

_STATE = "_prefix_sharing"
_VIEWS = "_prefix_sharing_views"
_PATIENCE = 8  # training calls without a shared token before saying so
_IMAGES = (
    "images must be the same bit for bit, in rows with equally many of their tokens, or laid out "
    "as preference trainers do: those of all chosen rows, then those of all rejected ones"
)


class Options(NamedTuple):
    """What `BackbonePatch.configure` takes."""

    backend: str
    on_bypass: OnBypass
    cache_by_default: bool
    trial: Trial | None
    before_first_call: BeforeFirstCall | None


class BackbonePatch:
    """State of one patched decoder stack, or of the composite around one; lives on the module as a
    plain attribute. It shares from the first `refresh` on."""

    def __init__(self, backbone: PreTrainedModel, backend: str, on_bypass: OnBypass) -> None:
        decoder = decoder_of(backbone)
        self.configure(backend, on_bypass)
        self.positions = learned_positions(decoder)
        self._seen: dict[State, Seen] = {}
        self.last: Selection | None = None  # of the last shared call
        self._selections: dict[tuple[str, Needs], Selection] = {}
        self.stats = SharingStats()
        self.warned: set[str] = set()
        self.unshared_training_calls: int | None = 0  # None once something was shared
        self._hooks: list[Any] = []
        self.recurrence: TreeRecurrence | None = None
        setattr(backbone, _STATE, self)  # first: it is what undoes the rest
        setattr(backbone, _VIEWS, Views())
        self._hooks.append(backbone.register_forward_pre_hook(pack_rows, with_kwargs=True))
        if decoder is not backbone:
            self._hooks.append(decoder.register_forward_pre_hook(pack_embeddings, with_kwargs=True))
        # Before those of the user, which are for rows.
        register = decoder.register_forward_hook  # one line below: Ctrl-C must not part it
        self._hooks.append(register(unpack_rows, prepend=True, with_kwargs=True))

    def refresh(self, backbone: PreTrainedModel) -> None:
        """Look at the model, each time it is enabled: kernels or layers may have been exchanged.

        Raises:
            NotImplementedError: recurrent layers that cannot follow the tree.
        """
        decoder = decoder_of(backbone)
        self.recurrence = recurrence_of(decoder)
        self._structure = structure_of(decoder)
        views_of(backbone).give(decoder)

    def configure(
        self,
        backend: str,
        on_bypass: OnBypass,
        cache_by_default: bool = True,
        trial: Trial | None = None,
        before_first_call: BeforeFirstCall | None = None,
    ) -> None:
        """Set the options; `cache_by_default` as in `bypass_reason`, `trial` as verification sets
        it."""
        self.backend = backend
        self.on_bypass: OnBypass = on_bypass
        self.cache_by_default = cache_by_default
        self.trial = trial
        self.before_first_call = before_first_call

    @property
    def options(self) -> Options:
        """What `configure` was given."""
        return Options(
            self.backend,
            self.on_bypass,
            self.cache_by_default,
            self.trial,
            self.before_first_call,
        )

    def remove(self, backbone: PreTrainedModel) -> None:
        self.recurrence = None
        for hook in self._hooks:
            hook.remove()
        unhook_towers(backbone)
        if _VIEWS in backbone.__dict__:
            views_of(backbone).restore(decoder_of(backbone))
            delattr(backbone, _VIEWS)
        delattr(backbone, _STATE)
        forget()

    @property
    def sees_padding(self) -> bool:
        """Whether hidden states depend on the padding before their row."""
        return self.recurrence is not None and self.recurrence.sees_padding

    def seen(self, backbone: PreTrainedModel) -> Seen:
        """What calls in the present state of model and autocast have shown of it."""
        state = state_of(decoder_of(backbone))
        return self._seen.setdefault(state, Seen.of(state))

    def selection(self, backbone: PreTrainedModel, seen: Seen | None = None) -> Selection:
        """The backend for a call in the present state of model and autocast.

        Raises:
            NotImplementedError, RuntimeError: as `select`.
        """
        needs = needs_of(decoder_of(backbone), self._structure, seen or self.seen(backbone))
        key = self.backend, needs
        if key not in self._selections:
            self._selections[key] = select(self.backend, needs, type(backbone).__name__)
        return self._selections[key]

    def packed_arguments(
        self,
        decoder: PreTrainedModel,
        plan: Plan,
        device: torch.device,
        given: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """What goes with the tokens of a packed row: a call of the decoder, counted here.

        Args:
            given: the arguments of a call with rows, as forward hooks see them; None if the caller
                gave the packed row, and gets one back.
        """
        seen, tree = self.seen(decoder), plan.on(device)
        self.last = chosen = self.selection(decoder, seen)
        self.stats.add(tree)
        arguments = tree.model_kwargs() | plan.backend_kwargs(chosen.backend, chosen.needs)
        arguments |= {
            "attention_mask": torch.zeros(EMPTY_MASK, dtype=decoder.dtype, device=device),
            "use_cache": False,
            "tree_backend": chosen.backend,
            "tree_seen": seen,
            "tree_rows": None if given is None else _Rows(tree, given),
        }
        if self.recurrence is not None:
            arguments["tree_recurrence"] = self.recurrence
        return arguments

    def bypass(self, reason: str, *, training: bool) -> None:
        """Count a call that runs as it is, and tell the user as asked."""
        self.stats.add_bypassed(reason)
        if reason == NOTHING_TO_GAIN or not (training or reason == CACHE_BY_DEFAULT):
            return
        message = f"prefix sharing is bypassed: {reason}. To share such a call, {advice(reason)}."
        if self.on_bypass == "raise":
            raise RuntimeError(message)
        if self.on_bypass == "warn" and reason not in self.warned:
            self.warned.add(reason)
            warn_caller(f"{message} It runs as without sharing.")

    def watch(self, tree: PrefixTree | None, media: bool) -> None:
        """Say so when the first training calls share nothing; `media` as in `PlannedCall`."""
        calls = self.unshared_training_calls  # read once: another thread may train the model too
        if calls is None:
            return
        if tree is not None and tree.packed_tokens < tree.row_tokens:
            self.unshared_training_calls = None
            return
        self.unshared_training_calls = calls + 1
        if calls + 1 == _PATIENCE and self.on_bypass != "ignore":
            warn_caller(
                f"prefix sharing: the first {_PATIENCE} training batches shared no token. Rows "
                "that share a prompt must be in one batch and start in the same column (right "
                f"padding){'; ' + _IMAGES if media else ''}; several documents in a row need "
                "position_ids and no attention_mask. Bypassed before this one: "
                f"{dict(self.stats.bypassed)}."
            )


def patch_of(backbone: PreTrainedModel) -> BackbonePatch | None:
    """The patch that a decoder stack carries, if any."""
    return backbone.__dict__.get(_STATE)


def unpatch(backbone: PreTrainedModel) -> None:
    """Take the patch off a decoder stack, if it carries one."""
    patch = patch_of(backbone)
    if patch is not None:
        patch.remove(backbone)


def patched_stacks(module: nn.Module) -> list[PreTrainedModel]:
    """Those of the decoder stacks in a module that carry a patch."""
    return [part for part in module.modules() if _STATE in part.__dict__]  # type: ignore[misc]


def views_of(backbone: PreTrainedModel) -> Views:
    """The views of a patched decoder stack."""
    views: Views = backbone.__dict__[_VIEWS]
    return views


def is_shared(model: nn.Module) -> bool:
    """Whether the decoder stack in a model, in its wrappers, carries a patch.

    Raises:
        TypeError: the model holds no `PreTrainedModel`.
    """
    return patch_of(backbone_of(unwrap(model, check=False))) is not None


@untraced
def pack_rows(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: replace the rows by their packed row where that is exact and gains.

    A composite keeps its rows, and takes the plan to its text decoder.
    """
    patch = patch_of(backbone)
    if patch is not None and patch.before_first_call is not None:
        act, patch.before_first_call = patch.before_first_call, None
        act(backbone)
        patch = patch_of(backbone)
    if patch is None or kwargs is None:  # it was taken off right before
        return None
    inputs = given = by_name(backbone, args, kwargs)
    decoder = decoder_of(backbone)
    packed, media = is_packed(inputs), media_of(backbone, decoder, inputs)
    times = 1  # that images are seen to repeat
    if packed:
        outdated = views_of(backbone).outdated(decoder)
        plan, inputs = take_packed(backbone, inputs, outdated)
    else:
        plan, times = _plan_rows(backbone, patch, inputs, media)
    if decoder is backbone:  # composites replace ids and positions
        check_embedded(backbone, plan, patch.positions)
    training = backbone.training and torch.is_grad_enabled()
    if training:
        patch.watch(plan.tree, bool(media))
    expect(backbone, decoder, times if plan.reason is None else 1)
    if plan.reason is not None and not packed:
        patch.bypass(plan.reason, training=training)
        return tuple(map(plain, args)), {name: plain(x) for name, x in kwargs.items()}
    inputs = without_boundaries(inputs)
    if decoder is not backbone:
        if packed:
            inputs["position_ids"] = plan.on(inputs["input_ids"].device).position_ids
        inputs = {name: plain(x) for name, x in inputs.items()}
        call = PlannedCall.of(patch, plan, inputs, packed, bool(media))
        return (), inputs | {"use_cache": False, CALL: call}
    ids = inputs["input_ids"]
    if not packed:
        inputs["input_ids"] = plan.on(ids.device).pack(ids)
    given_rows = None if packed else given
    return (), inputs | patch.packed_arguments(backbone, plan, ids.device, given_rows)


def _plan_rows(
    backbone: PreTrainedModel, patch: BackbonePatch, inputs: dict[str, Any], media: list[str]
) -> tuple[Plan, int]:
    """The plan that the rows of a call carry, or else one made for them, and how often the images
    of the call repeat."""
    check_tensors(inputs)
    decoder = decoder_of(backbone)
    others = {name: x for name, x in inputs.items() if name not in media}
    reason = bypass_reason(backbone, others, patch.cache_by_default)
    reason = reason or views_of(backbone).outdated(decoder)
    reason = reason or documents_reason(backbone, inputs, patch.trial, bool(media))
    if reason is not None:
        return Plan(None, reason), 1
    rows, times = [inputs.get(name) for name in ROW_INPUTS], 1
    if media:  # a plan that came along was made by ids alone
        ids, tensors = inputs["input_ids"], [inputs[name] for name in media]
        shown = Shown.of(backbone.config, ids, tensors)
        plan, times = recall_plan([shown.tell_apart(ids), *rows[1:]]), shown.times
    else:
        plan = plan_of(inputs) or recall_plan(rows)
    misfit = None if plan.reason is not None else _misfit(patch, decoder, inputs, plan)
    return (plan if misfit is None else Plan(None, misfit)), times


def _misfit(
    patch: BackbonePatch, decoder: PreTrainedModel, inputs: dict[str, Any], plan: Plan
) -> str | None:
    """Why rows with this plan must run as they are all the same; None if they need not."""
    if not boundaries_agree(inputs, plan):
        return "boundaries of documents that are not those of position_ids"
    if rope_depends_on_length(decoder.config) and plan.padded_beyond:
        return "rotary frequencies that depend on padding"
    if patch.sees_padding and plan.padded_before:
        return "recurrent layers with a bias that is added to padding before a row"
    return None


@untraced
def unpack_rows(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook: give everything that the decoder stack returns back as rows, and let the hooks
    after this one see the arguments of the call as they were."""
    if kwargs.get("tree_backend") is not None:
        ask_in_backward(backbone, output[0], unpack_rows)
    rows: _Rows | None = kwargs.get("tree_rows")
    if rows is None:
        return output
    if output[0].shape[:2] != (1, rows.tree.packed_tokens):
        raise not_packed(backbone, output[0].shape)
    kwargs.clear()
    kwargs.update(rows.given)
    rows.given = {}  # checkpointed layers keep these rows until backward
    return unpack_output(rows.tree, output)


class _Rows:
    """Takes the tree and the arguments of the call from hook to hook through the layers, which have
    no use for them: compiled code looks into a dataclass (torch 2.11), and is made anew for trees
    of another size."""

    def __init__(self, tree: PrefixTree, given: dict[str, Any]) -> None:
        self.tree, self.given = tree, given
