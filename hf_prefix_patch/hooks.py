"""The two hooks on a decoder stack: rows in, packed row through the layers, rows out.

The hooks are plain functions that find their state on the module they are called with, so that a
deep copy of a model runs its own weights. What a call needs travels in its keyword arguments:
checkpointed layers run again in backward, when any state outside the call has moved on.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.attention import NAME, Backend
from hf_prefix_patch.stats import SharingStats
from hf_prefix_patch.support import bypass_reason, rope_depends_on_length
from hf_prefix_patch.tree import PrefixTree, has_holes, host_rows

OnBypass = Literal["warn", "ignore", "raise"]

_STATE = "_prefix_sharing"
_NOTHING_TO_GAIN = "nothing to gain"
_CACHE_BY_DEFAULT = "key/value cache by default"
_PATIENCE = 8  # training calls without a shared token before saying so


class BackbonePatch:
    """State of one patched decoder stack; lives on the module as a plain attribute."""

    def __init__(self, backbone: PreTrainedModel, backend: Backend, on_bypass: OnBypass) -> None:
        self.backend = backend
        self.on_bypass: OnBypass = on_bypass
        self.stats = SharingStats()
        self.warned: set[str] = set()
        self.unshared_training_calls: int | None = 0  # None once something was shared
        _swap_attention_configs(backbone)
        self._hooks = [
            backbone.register_forward_pre_hook(pack_rows, with_kwargs=True),
            backbone.register_forward_hook(unpack_rows, with_kwargs=True),
        ]
        setattr(backbone, _STATE, self)

    def remove(self, backbone: PreTrainedModel) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in backbone.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "prefix_sharing_original"):
                module.config = config.prefix_sharing_original
        delattr(backbone, _STATE)

    def bypass(self, reason: str, *, training: bool) -> None:
        """Count a call that runs as it is, and tell the user as asked."""
        self.stats.bypassed[reason] += 1
        if reason == _NOTHING_TO_GAIN or not (training or reason == _CACHE_BY_DEFAULT):
            return
        message = f"prefix sharing is bypassed: {reason}. " + (
            "A call outside training asks for a cache by the config's default; "
            "pass use_cache=False to share it."
            if reason == _CACHE_BY_DEFAULT
            else "The call runs as without sharing; see docs/limits.md for what can be shared."
        )
        if self.on_bypass == "raise":
            raise RuntimeError(message)
        if self.on_bypass == "warn" and reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(message, stacklevel=2)

    def watch(self, tree: PrefixTree | None) -> None:
        """Say so when the first training calls share nothing."""
        if self.unshared_training_calls is None:
            return
        if tree is not None and tree.packed_tokens < tree.row_tokens:
            self.unshared_training_calls = None
            return
        self.unshared_training_calls += 1
        if self.unshared_training_calls == _PATIENCE and self.on_bypass != "ignore":
            warnings.warn(
                f"prefix sharing: the first {_PATIENCE} training batches shared no token. Rows "
                "that share a prompt must be in one batch and start in the same column (right "
                f"padding). Bypassed calls: {dict(self.stats.bypassed)}.",
                stacklevel=2,
            )


def patch_of(backbone: PreTrainedModel) -> BackbonePatch | None:
    """The patch that a decoder stack carries, if any."""
    return backbone.__dict__.get(_STATE)


def pack_rows(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: replace the rows by their packed row where that is exact and gains."""
    patch = patch_of(backbone)
    assert patch is not None, "the hook outlived its patch"
    inputs = dict(kwargs)
    if args:
        inputs |= zip(inspect.signature(backbone.forward).parameters, args, strict=False)
    reason = bypass_reason(backbone, inputs)
    tree = None
    if reason is None:
        tree, reason = _plan(backbone, inputs)
    training = backbone.training and torch.is_grad_enabled()
    if training:
        patch.watch(tree)
    if reason is not None:
        patch.bypass(reason, training=training)
        return None
    assert tree is not None
    patch.stats.add(tree)
    ids = inputs["input_ids"]
    dtype = next(x.dtype for x in backbone.parameters() if x.is_floating_point())
    inputs |= tree.model_kwargs() | patch.backend.plan(tree)
    inputs |= {
        "input_ids": tree.pack(ids),
        # transformers hands a 4-D mask on as it is; shared attention does not read it.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=dtype, device=ids.device),
        "use_cache": False,
        "tree_attend": patch.backend.attend,
        "tree_rows": tree,
    }
    return (), inputs


def unpack_rows(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook: give everything that the decoder stack returns back as rows."""
    tree = kwargs.get("tree_rows")
    return output if tree is None else _unpack_output(tree, output)


def _unpack_output(tree: PrefixTree, output: Any) -> Any:
    if isinstance(output, Tensor):
        if output.shape[:2] == (1, tree.packed_tokens):
            return tree.unpack(output)
        if output.shape[:1] == (tree.packed_tokens,):  # router logits: [N, experts]
            return tree.unpack(output[None]).flatten(0, 1)
        return output
    if isinstance(output, dict):  # ModelOutput
        output = copy.copy(output)
        for name, value in output.items():
            output[name] = _unpack_output(tree, value)
        return output
    if isinstance(output, tuple | list):
        return type(output)(_unpack_output(tree, x) for x in output)
    return output


def _plan(
    backbone: PreTrainedModel, inputs: dict[str, Any]
) -> tuple[PrefixTree | None, str | None]:
    """The tree of the call's rows, or why there is none to use."""
    rows = [inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")]
    tree, reason = _recall(rows)
    if tree is None and reason is None:
        tree, reason = _grow(inputs["input_ids"], *rows[1:])
        _remember(rows, tree, reason)
    if tree is None or reason is not None:
        return None, reason
    if rope_depends_on_length(backbone.config):
        positions = inputs.get("position_ids")
        longest = tree.row_length - 1 if positions is None else int(positions.max())
        if longest != int(tree.position_ids.max()):
            return None, "rotary frequencies that depend on padding"
    return tree, None


def _grow(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> tuple[PrefixTree | None, str | None]:
    host_ids, host_mask, host_positions = host_rows(ids, mask, positions)
    if has_holes(host_mask):
        return None, "attention mask with holes"
    if not host_mask.any():
        return None, "no real token"
    tree = PrefixTree.from_rows(host_ids, host_mask, host_positions).to(ids.device)
    return tree, None if tree.packed_tokens < tree.padded_tokens else _NOTHING_TO_GAIN


class _Planned(NamedTuple):
    """The last batch planned; the reference forward of the same tensors finds its tree here."""

    rows: tuple[weakref.ref[Tensor] | None, ...]
    versions: tuple[int | None, ...]
    tree: PrefixTree | None
    reason: str | None


_last_planned: _Planned | None = None


def _remember(rows: list[Tensor | None], tree: PrefixTree | None, reason: str | None) -> None:
    global _last_planned
    if any(x is not None and x.is_inference() for x in rows):  # those keep no version
        return
    refs = tuple(None if x is None else weakref.ref(x) for x in rows)
    _last_planned = _Planned(refs, _versions(rows), tree, reason)


def _recall(rows: list[Tensor | None]) -> tuple[PrefixTree | None, str | None]:
    last = _last_planned
    if last is None or any(x is not None and x.is_inference() for x in rows):
        return None, None
    same = all((r() if r else None) is x for r, x in zip(last.rows, rows, strict=True))
    return (last.tree, last.reason) if same and last.versions == _versions(rows) else (None, None)


def _versions(rows: list[Tensor | None]) -> tuple[int | None, ...]:
    return tuple(None if x is None else x._version for x in rows)


def _swap_attention_configs(backbone: PreTrainedModel) -> None:
    """Give attention modules a copy of their config that names our attention function.

    The model's own config stays as the user set it: saving, mask creation and models built from it
    never see a difference.
    """
    copies: dict[int, Any] = {}
    for module in backbone.modules():
        config = getattr(module, "config", None)
        if config is None or module is backbone or "attention" not in type(module).__name__.lower():
            continue
        if id(config) not in copies:
            shared = copy.copy(config)
            shared._attn_implementation_internal = NAME
            shared.prefix_sharing_original = config
            copies[id(config)] = shared
        module.config = copies[id(config)]
