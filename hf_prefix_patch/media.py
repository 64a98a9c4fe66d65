"""Images, video and sound in a call of a composite: which rows have the same.

Placeholders of two images are the same ids, so ids alone do not tell rows apart. What they stand
for does: composites put the features of their images where the placeholders are, in the order of
the rows. Where all rows have as many placeholders, each has an equal part of what the call holds of
images. Where they do not, but all of it repeats after a part of the rows (as in the batches of
preference trainers: those of all chosen rows, then the same of all rejected ones), row `i` has the
images of row `i` plus that part.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch.backends.base import autocast_dtype
from hf_prefix_patch.bypass import KNOWN_INPUTS, TOKEN_TYPES

# What configs call the ids that stand for parts of images or sound, and for where these begin and
# end; not those of text, of which answers may have any number.
_PLACEHOLDER = re.compile(
    r"(?!_)(?=.*(image|video|audio|vision|speech|frame|boi|eoi|boa|eoa))\w+_token_(id|index)"
)


def media_of(
    composite: PreTrainedModel, decoder: PreTrainedModel, inputs: dict[str, Any]
) -> list[str]:
    """Which arguments of a composite's call are tensors of images and the like, or say how these
    are laid out, the smallest first; none of a model that is its own decoder, or whose config names
    no placeholder."""
    if composite is decoder or not _placeholders(composite.config):
        return []
    mine, its = (inspect.signature(m.forward).parameters.keys() for m in (composite, decoder))
    names = (mine - its) - KNOWN_INPUTS.union(TOKEN_TYPES)
    sizes = {name: x.numel() for name in names if has_entries(x := inputs.get(name))}
    return sorted(sizes, key=lambda name: (sizes[name], name))


@dataclass(frozen=True)
class Shown:
    """What the rows of a call show.

    Attributes:
        numbers: `[R]` int64; rows of one number have the same images.
        times: how often the images of the call repeat: row `i` has those of row `i + R / times`.
    """

    numbers: Tensor
    times: int = 1

    @classmethod
    def of(cls, config: Any, input_ids: Tensor, media: list[Tensor]) -> Shown:
        """Compare the images of rows.

        Args:
            config: of the composite, which names its placeholders.
            input_ids: `[R, L]`.
            media: of `media_of`, their entries in the order of the rows.
        """
        ids, rows = input_ids.as_subclass(Tensor), len(input_ids)
        apart = torch.arange(rows, device=ids.device)
        if ids.is_meta or not ids.numel():
            return cls(apart)
        if torch.is_grad_enabled() and any(x.requires_grad for x in media):
            return cls(apart)  # each row wants a gradient of its own
        # Rows of unlike numbers of placeholders take unlike parts of the media.
        tokens = torch.tensor(sorted(_placeholders(config)), device=ids.device)
        placeholders = (ids[..., None] == tokens).sum(1)
        divisors = (n for n in range(rows, 0, -1) if rows % n == 0)
        times = next(n for n in divisors if all(repeats(x, n) for x in (placeholders, *media)))
        if times < rows and repeats(placeholders, rows) and all(len(x) % rows == 0 for x in media):
            parts = [x.reshape(rows, x.numel() // rows) for x in media]
            return cls(torch.tensor(_first_alike(parts), device=ids.device), times)
        return cls(apart % (rows // times), times)

    def tell_apart(self, input_ids: Tensor) -> Tensor:
        """`[R, L]` ids that only rows with the same images have in common."""
        ids = input_ids.as_subclass(Tensor)
        if not ids.numel():
            return ids
        return ids + self.numbers[:, None] * (ids.max() + 1)


def _first_alike(parts: list[Tensor]) -> list[int]:
    """For each row of all `[R, n]` parts, the first that is the same: where every row has as many
    placeholders, it has as many of the entries."""
    # Of bytes, which are the same in any order; rows of other sums need no comparison.
    sums = [x.contiguous().view(torch.uint8).sum(1).tolist() for x in parts]
    keys = list(zip(*sums, strict=True))
    first: list[int] = []
    for row, key in enumerate(keys):
        same = (
            earlier
            for earlier in range(row)
            if first[earlier] == earlier
            and keys[earlier] == key
            and all(torch.equal(x[earlier], x[row]) for x in parts)
        )
        first.append(next(same, row))
    return first


def has_entries(x: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor with an entry for each image, or the like."""
    return isinstance(x, Tensor) and x.ndim > 0


def repeats(x: Tensor, times: int) -> bool:
    """Whether a tensor is so many copies of one part, one after the other."""
    part, rest = divmod(len(x), times)
    return not rest and torch.equal(x[part:], x[: len(x) - part])


def alike(ours: Tensor, theirs: Tensor) -> Tensor:
    """Bool scalar: whether `[n, ...]` are the same, entry by entry; floats to half of the digits of
    the type they are computed in, as kernels round by the place in a batch."""
    if not ours.is_floating_point():
        return torch.all(ours == theirs)
    dtype = autocast_dtype(ours.device) or ours.dtype
    ours, theirs = (x.detach().float().reshape(*x.shape[:1], x[:1].numel()) for x in (ours, theirs))
    error: Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    size: Tensor = torch.linalg.vector_norm(theirs, dim=1)
    return torch.all(error <= size * torch.finfo(dtype).eps ** 0.5)


def _placeholders(config: Any) -> set[int]:
    ids = (getattr(config, name) for name in vars(config) if _PLACEHOLDER.fullmatch(name))
    return {x for x in ids if isinstance(x, int)}
