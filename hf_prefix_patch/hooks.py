"""The two hooks on a decoder stack: rows in, packed row through the layers, rows out.

The hooks are plain functions that find their state on the module they are called with, so that a
deep copy of a model runs its own weights. What a call needs travels in its keyword arguments:
checkpointed layers run again in backward, when any state outside the call has moved on.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.attention import EMPTY_MASK, NAME, Backend
from hf_prefix_patch.plans import NOTHING_TO_GAIN, forget, plan_rows
from hf_prefix_patch.stats import SharingStats
from hf_prefix_patch.support import CACHE_BY_DEFAULT, bypass_reason
from hf_prefix_patch.tree import PrefixTree

OnBypass = Literal["warn", "ignore", "raise"]

_STATE = "_prefix_sharing"
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
        forget()

    def bypass(self, reason: str, *, training: bool) -> None:
        """Count a call that runs as it is, and tell the user as asked."""
        self.stats.bypassed[reason] += 1
        if reason == NOTHING_TO_GAIN or not (training or reason == CACHE_BY_DEFAULT):
            return
        message = f"prefix sharing is bypassed: {reason}. " + (
            "A call outside training asks for a cache by the config's default; "
            "pass use_cache=False to share it."
            if reason == CACHE_BY_DEFAULT
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
        tree, reason = plan_rows(backbone, inputs)
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
        # transformers hands a 4-D mask on as it is. Shared attention reads none; any other
        # attention that meets one of no size fails, where it would leak between branches.
        "attention_mask": torch.zeros(EMPTY_MASK, dtype=dtype, device=ids.device),
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
        if output.shape[1:3] == (1, tree.packed_tokens):  # Gemma 3n stacks several hidden states
            return torch.stack([tree.unpack(x) for x in output])
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


class _SharedAttentionConfig:
    """A model's config as its attention modules see it: another attention function, all else live.

    The model's own config stays as the user set it: saving, mask creation and models built from it
    never see a difference.
    """

    _attn_implementation = _attn_implementation_internal = NAME

    def __init__(self, original: Any) -> None:
        self.prefix_sharing_original = original

    def __getattr__(self, name: str) -> Any:
        if name == "prefix_sharing_original" or name.startswith("__"):  # before __init__: copying
            raise AttributeError(name)
        return getattr(self.prefix_sharing_original, name)


def _swap_attention_configs(backbone: PreTrainedModel) -> None:
    views: dict[int, _SharedAttentionConfig] = {}
    for module in backbone.modules():
        config: Any = getattr(module, "config", None)
        if config is None or module is backbone or "attention" not in type(module).__name__.lower():
            continue
        view: Any = views.setdefault(id(config), _SharedAttentionConfig(config))
        module.config = view
