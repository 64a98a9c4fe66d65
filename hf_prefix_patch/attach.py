"""One model patched and checked, or left as it was."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.composite import decoder_of, pack_embeddings
from hf_prefix_patch.hooks import BackbonePatch, OnBypass, Options, patch_of, unpatch
from hf_prefix_patch.support import check_model
from hf_prefix_patch.trainer import autocast_of
from hf_prefix_patch.verify import verify_sharing
from hf_prefix_patch.wrappers import backbone_of, outermost, unwrap

logger = logging.getLogger(__name__)


class Shared(NamedTuple):
    """A decoder stack that was patched.

    Attributes:
        backbone: the stack.
        found: the options of the patch that was there already, as `configure` takes them; None if
            there was none.
    """

    backbone: PreTrainedModel
    found: Options | None


def share_model(
    trainer: Any,
    backend: str,
    on_bypass: OnBypass,
    verify: bool,
    undo: ExitStack,
    module: nn.Module,
    is_policy: bool = True,
) -> Shared:
    """Patch one model, or raise and leave it as it was.

    Args:
        trainer: what runs the model; None for a loop of the user's own.
        backend, on_bypass, verify: as `enable_prefix_sharing`.
        undo: learns how to bring the model back to how it was.
        module: the model as it is called, in its wrappers.
        is_policy: whether it is what is trained, not a model that a trainer holds beside that.

    Raises:
        TypeError, NotImplementedError, RuntimeError: as `enable_prefix_sharing`.
    """
    model = unwrap(module)
    backbone = backbone_of(model)
    check_model(model, decoder_of(backbone))
    _check_other_patch(backbone)
    with ExitStack() as mine:
        patch, found = patch_of(backbone), None
        if patch is None:
            mine.callback(unpatch, backbone)
            patch = BackbonePatch(backbone, backend, on_bypass)
        else:
            found = patch.options
            mine.callback(patch.configure, *found)
            mine.callback(setattr, patch, "last", patch.last)
        # Nobody goes on from the cache of a classifier, and a trainer that calls a model beside its
        # policy reads the outputs alone.
        classifies = backbone is not model and not model.can_generate()
        if found is not None and found.cache_by_default:
            classifies = False  # alone: another head on the same stack may go on from its cache
        patch.configure(backend, on_bypass, is_policy and not classifies)
        patch.refresh(backbone)
        with nullcontext() if trainer is None else autocast_of(trainer, backbone.device):
            patch.last = patch.selection(backbone)
            if verify:
                verify_sharing(outermost(module), backbone)
        name = type(backbone).__name__
        logger.info("prefix sharing enabled on %s, backend %s", name, patch.last.backend.name)
        undo.enter_context(mine.pop_all())
    return Shared(backbone, found)


def _check_other_patch(backbone: PreTrainedModel) -> None:
    """Refuse to patch a text decoder and the composite around it both."""
    decoder, name = decoder_of(backbone), type(backbone).__name__
    if decoder is not backbone and patch_of(decoder) is not None:
        raise RuntimeError(
            f"the text decoder of this {name} is shared by itself already, and only one "
            "of the two can be; call disable_prefix_sharing on the decoder first"
        )
    if pack_embeddings in backbone._forward_pre_hooks.values() and decoder is backbone:
        raise RuntimeError(
            f"this {name} is shared already, as the text decoder of a composite, and only one of "
            "the two can be; call disable_prefix_sharing on the composite first, or leave it at "
            "that"
        )
