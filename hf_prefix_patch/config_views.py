"""The view of a model's config that makes its attention modules call shared attention."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_prefix_patch.attention import NAME
from hf_prefix_patch.features import is_attention, layer_slides


class _SharedAttentionConfig:
    """A model's config as its attention modules see it: another attention function, all else live.

    The model's own config stays as the user set it: saving, mask creation and models built from it
    never see a difference.

    Attributes:
        prefix_sharing_original: the model's config.
        prefix_sharing_slides: whether the modules with this view have a sliding window; None if
            they do not say which layer they are.
    """

    _attn_implementation = _attn_implementation_internal = NAME

    def __init__(self, original: Any, slides: bool | None) -> None:
        self.prefix_sharing_original = original
        self.prefix_sharing_slides = slides

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("prefix_sharing", "__")):  # before __init__: copying
            raise AttributeError(name)
        return getattr(self.prefix_sharing_original, name)


def give_views(backbone: PreTrainedModel) -> None:
    """Let the attention modules of a decoder stack call shared attention."""
    # One view for all layers of a kind: compiled code is made for each object it sees.
    views: dict[tuple[int, bool | None], _SharedAttentionConfig] = {}
    for module in backbone.modules():
        config: Any = getattr(module, "config", None)
        if config is None or module is backbone or not is_attention(module):
            continue
        layer = getattr(module, "layer_idx", None)
        slides = None if layer is None else layer_slides(config, layer)
        key = id(config), slides
        view: Any = views.setdefault(key, _SharedAttentionConfig(config, slides))
        module.config = view


def restore_configs(backbone: PreTrainedModel) -> None:
    """Give the modules of a decoder stack their own config back."""
    for module in backbone.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "prefix_sharing_original"):
            module.config = config.prefix_sharing_original
