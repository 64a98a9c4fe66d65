"""Images, video and sound in a call of a composite: which rows have the same.

Placeholders of two images are the same ids, so ids alone do not tell rows apart. What they stand
for does: composites put the features of their images where the placeholders are, in the order of
the rows. If everything that a call holds of images repeats after a part of its rows (as in the
batches of preference trainers: those of all chosen rows, then the same of all rejected ones), row
`i` has the images of row `i` plus that part.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.bypass import KNOWN_INPUTS, TOKEN_TYPES

ROUNDING = torch.finfo(torch.bfloat16).eps ** 0.5
"""By how much features of one image may differ with its place in a batch, of their norm: half of
the digits of the coarsest type that a tower may compute in, whatever it hands on."""

_OF_TEXT = {"bos_token_id", "eos_token_id", "pad_token_id"}


def media_of(
    composite: PreTrainedModel, decoder: PreTrainedModel, inputs: dict[str, Any]
) -> set[str]:
    """Which arguments of a composite's call are tensors of images and the like, or say how these
    are laid out; none of a model that is its own decoder, or does not name its placeholders."""
    if composite is decoder or not _placeholders(composite.config):
        return set()
    mine, its = (inspect.signature(m.forward).parameters.keys() for m in (composite, decoder))
    names = (mine - its) - KNOWN_INPUTS.union(TOKEN_TYPES)
    return {name for name in names if isinstance(x := inputs.get(name), Tensor) and x.ndim}


def repetitions(config: Any, input_ids: Tensor, media: list[Tensor]) -> int:
    """How often the images of a call repeat: row `i` has those of row `i + R / repetitions`.

    Args:
        config: of the composite, which names its placeholders.
        input_ids: `[R, L]`.
        media: of `media_of`, in the order of the rows.
    """
    if input_ids.is_meta:
        return 1
    ids, rows = input_ids.as_subclass(Tensor), len(input_ids)
    # Rows of unlike numbers of placeholders take unlike parts of the media.
    placeholders = [(ids == token).sum(1) for token in _placeholders(config)]
    times = (n for n in range(rows, 0, -1) if rows % n == 0)
    return next(n for n in times if all(repeats(x, n) for x in placeholders + media))


def told_apart(input_ids: Tensor, repetitions: int) -> Tensor:
    """`[R, L]` ids that only rows with the same images have in common."""
    ids, rows = input_ids.as_subclass(Tensor), len(input_ids)
    number = torch.arange(rows, device=ids.device) % (rows // repetitions)
    return ids + number[:, None] * (ids.max() + 1)


def _placeholders(config: Any) -> set[int]:
    """Ids of a config by name, those that stand for a part of an image or sound among them."""
    names = (name for name in vars(config) if re.fullmatch(r"[a-z]\w*_token_(id|index)", name))
    ids = (getattr(config, name) for name in names if name not in _OF_TEXT)
    return {x for x in ids if isinstance(x, int)}


def repeats(x: Tensor, times: int) -> bool:
    """Whether a tensor is so many copies of one part, one after the other."""
    part, rest = divmod(len(x), times)
    return not rest and torch.equal(x[part:], x[: len(x) - part])
