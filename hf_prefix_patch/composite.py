"""Composite models: a text decoder behind embeddings that images or sound may join.

A composite is called with token ids, so its call is planned there. What it makes of them, it makes
of the rows as ever: embeddings, positions of one or several axes, masks. Its text decoder is called
with those, and they are packed there, if they say of every token what the plan takes for granted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from hf_prefix_patch.bypass import PASSED_THROUGH, TOKEN_TYPES, passes_through
from hf_prefix_patch.hooking import by_name, untraced
from hf_prefix_patch.media import alike
from hf_prefix_patch.plans import Plan
from hf_prefix_patch.support import refusal
from hf_prefix_patch.tree import PrefixTree

if TYPE_CHECKING:
    from hf_prefix_patch.hooks import BackbonePatch

CALL = "tree_call"
"""The argument that takes a planned call to the text decoder."""

_CELLS = 4096  # that are compared at once

# The columns of the rows, which composites of transformers 4 hand on as places in a cache.
_NO_CACHE = "cache_position"

# What vision towers add to the first layers (DeepStack), one entry for each cell that is marked.
_MARKS, _MARKED = "visual_pos_masks", "deepstack_visual_embeds"


def decoder_of(backbone: PreTrainedModel) -> PreTrainedModel:
    """The text decoder of a composite's inner model; of any other model, the model itself.

    Raises:
        NotImplementedError: a composite whose text decoder is no module of its own.
    """
    text_config = backbone.config.get_text_config(decoder=True)
    if text_config is backbone.config or backbone.config.is_encoder_decoder:
        return backbone
    decoder = backbone.get_decoder()  # type: ignore[no-untyped-call]
    if isinstance(decoder, PreTrainedModel):
        decoder = decoder.base_model  # some composites hold a causal LM
    if not isinstance(decoder, PreTrainedModel) or decoder is backbone:
        raise refusal(
            type(backbone).__name__,
            "is a composite (vision- or audio-language) model without a text decoder of its own",
            "one to run on the packed row",
        )
    return decoder if decoder.config is text_config else decoder_of(decoder)


@dataclass(frozen=True, eq=False)
class PlannedCall:
    """A call of a composite that can be shared, on its way to the text decoder.

    Attributes:
        patch: of the composite.
        plan: its tree.
        mask: `[R, L]`, what the composite was called with; None if every token is real.
        token_types: `[R, L]` each, what the composite was told of its tokens.
        packed: whether the call holds a packed row, not rows.
        media: whether it holds images or sound.
    """

    patch: BackbonePatch
    plan: Plan
    mask: Tensor | None
    token_types: dict[str, Tensor]
    packed: bool
    media: bool

    @classmethod
    def of(
        cls, patch: BackbonePatch, plan: Plan, inputs: dict[str, Any], packed: bool, media: bool
    ) -> PlannedCall:
        types = {name: inputs[name] for name in TOKEN_TYPES if inputs.get(name) is not None}
        return cls(patch, plan, inputs.get("attention_mask"), types, packed, media)

    def pack(
        self, decoder: PreTrainedModel, inputs: dict[str, Any]
    ) -> tuple[dict[str, Any], str | None]:
        """What the text decoder is called with on the packed row, or why it runs on rows.

        Args:
            decoder: the text decoder.
            inputs: what the composite calls it with: `inputs_embeds` `[R, L, H]` or token ids,
                `position_ids` `[R, L]` or `[A, R, L]` for `A` axes, masks, and others.
        """
        if not self._has_plain_mask(decoder, inputs):
            return inputs, "a mask that is not causal attention to real tokens"
        for name, x in self.token_types.items():
            if not self._agrees(x):
                return inputs, f"input {name!r} that differs between rows"
        result = {name: x for name, x in inputs.items() if name != _NO_CACHE}
        for name, x in result.items():
            if name in PASSED_THROUGH and not (x is None or passes_through(decoder, name, x)):
                return inputs, f"input {name!r} of the text decoder"
            if name in ("attention_mask", CALL) or not isinstance(x, Tensor | list | tuple):
                continue
            if isinstance(x, Tensor) and x.ndim == 0:  # num_items_in_batch, for the loss
                continue
            result[name], reason = self._pack_one(name, x, inputs)
            if reason is not None:
                return inputs, reason
        return result, None

    def _pack_one(
        self, name: str, x: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor | list[Tensor] | None, str | None]:
        """One of the inputs for the packed row, or why the rows do not have it in common."""
        tree = self.plan.on(_tokens(inputs).device)
        rows = (1, tree.packed_tokens) if self.packed else (tree.num_rows, tree.row_length)
        pack = (lambda x: x) if self.packed else tree.pack
        if isinstance(x, Tensor) and name == "position_ids":
            x = x.expand(*x.shape[:-2], *rows).movedim((-2, -1), (0, 1))
            if not self._agrees(x):
                return None, "position_ids that differ between rows"
            return pack(x).movedim((0, 1), (-2, -1)), None
        if isinstance(x, Tensor) and tuple(x.shape[:2]) == rows:
            if self._agrees(x):
                return pack(x), None
            if x.is_floating_point():
                return None, f"features {name!r} that differ between rows"
            return None, f"input {name!r} that differs between rows"
        if name == _MARKED and not self.packed:
            return self._pack_marked(tree, x, inputs.get(_MARKS))
        return None, f"input {name!r} of the text decoder"

    def _pack_marked(
        self, tree: PrefixTree, features: list[Any], marks: Tensor | None
    ) -> tuple[list[Tensor] | None, str | None]:
        """The same for features `[M, ...]` of the `M` cells that are marked, in row order."""
        if marks is None or not {len(x) for x in features} <= {int(marks.sum())}:
            return None, f"input {_MARKED!r} of the text decoder"
        flat = marks.flatten()
        place = flat.cumsum(0) - 1  # of a cell among the marked
        copies, kept = (cells[flat[cells]] for cells in self.plan.copies(flat.device))
        if not all(alike(x[place[copies]], x[place[kept]]) for x in features):
            return None, f"features {_MARKED!r} that differ between rows"
        packed = place[tree.source[flat[tree.source]]]
        return [x[packed] for x in features], None

    def _agrees(self, x: Tensor) -> bool:
        """Whether `[R, L, ...]` is the same in all cells of each packed token. What is made of text
        alone is made of equal ids."""
        if self.packed or (x.is_floating_point() and not self.media):
            return True
        flat = x.flatten(0, 1)
        pairs = zip(*(torch.split(y, _CELLS) for y in self.plan.copies(x.device)), strict=True)
        return bool(torch.stack([alike(flat[copy], flat[kept]) for copy, kept in pairs]).all())

    def _has_plain_mask(self, decoder: PreTrainedModel, inputs: dict[str, Any]) -> bool:
        """Whether the decoder was handed the caller's mask, or what transformers makes of it."""
        handed, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        embeddings = inputs.get("inputs_embeds")
        if handed is self.mask or embeddings is None:
            return handed is self.mask
        if positions is not None and positions.ndim != 2:
            positions = None
        no_blocks = torch.full(embeddings.shape[:2], -1, device=embeddings.device)
        columns = torch.arange(embeddings.shape[1], device=embeddings.device)
        return any(
            _same(
                handed,
                create_masks_for_generate(
                    decoder.config,
                    embeddings,
                    self.mask,
                    past_key_values=None,
                    position_ids=positions,
                    cache_position=columns,  # of transformers 4
                    block_sequence_ids=blocks,
                ),
            )
            for blocks in (None, no_blocks)  # left out where sdpa needs none, or written out
        )


@untraced
def pack_embeddings(
    decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a text decoder: replace what its composite made of rows by the packed
    row, if the composite's call was planned."""
    call: PlannedCall | None = kwargs.get(CALL)
    if call is None:
        return None
    given = by_name(decoder, args, kwargs)
    del given[CALL]
    inputs, reason = call.pack(decoder, given)
    if reason is not None:
        if call.packed:
            raise ValueError(
                f"a packed row cannot run with: {reason}; use a collator with layout='rows'"
            )
        call.patch.bypass(reason, training=decoder.training and torch.is_grad_enabled())
        return (), inputs
    device = _tokens(inputs).device
    rows = None if call.packed else given
    arguments = call.patch.packed_arguments(decoder, call.plan, device, rows)
    if inputs.get("position_ids") is not None:
        del arguments["position_ids"]
    return (), inputs | arguments


def _tokens(inputs: dict[str, Any]) -> Tensor:
    """Embeddings, or ids where the decoder looks them up itself."""
    found = [inputs.get(name) for name in ("inputs_embeds", "input_ids")]
    return next(x for x in found if isinstance(x, Tensor))


def _same(handed: Any, plain: Any) -> bool:
    if isinstance(handed, dict) and isinstance(plain, dict):
        return handed.keys() == plain.keys() and all(_same(handed[k], plain[k]) for k in plain)
    if isinstance(handed, Tensor) and isinstance(plain, Tensor):
        fits = (handed.shape, handed.dtype) == (plain.shape, plain.dtype)
        return fits and torch.equal(handed, plain)
    return handed is None and plain is None
