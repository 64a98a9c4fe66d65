"""The view of a model's config that makes its attention modules call shared attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.attention import NAME
from hf_prefix_patch.bypass import LAYERS_CHANGED
from hf_prefix_patch.features import (
    is_attention,
    layer_slides,
    named_layer_types,
    sliding_window,
)


class _SharedAttentionConfig:
    """A model's config as its attention modules see it: another attention function, all else live.

    The model's own config stays as the user set it: saving, mask creation and models built from it
    never see a difference. What is written to a view is written to that config.

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("prefix_sharing"):
            super().__setattr__(name, value)
        else:
            setattr(self.prefix_sharing_original, name, value)


class Views:
    """The views that the attention modules of a decoder stack were given, by the layers and layer
    types that it has. Both may be changed afterwards: layers pruned, windows switched off.

    Holds modules, and so lives on the stack itself, to go and to be copied with it.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._layers: tuple[Any, ...] = ()

    def give(self, decoder: PreTrainedModel) -> None:
        """Give views by the layers as they are now; another time, to those that have not the right
        one. A layer that two stacks have in common has a view for each, one in the other."""
        found = list(_attention(decoder))
        here = {id(module) for module, _ in found}
        for module in self._modules:
            if id(module) not in here:  # it has left
                _restore(module)
        # One view for all layers of a kind: compiled code is made for each object it sees.
        views: dict[tuple[int, bool | None], Any] = {}
        for module, slides in found:
            config: Any = module.config
            again = bool(self._layers) and isinstance(config, _SharedAttentionConfig)
            original = config.prefix_sharing_original if again else config
            fits = again and _fits(module, slides)
            view = config if fits else _SharedAttentionConfig(original, slides)
            module.config = views.setdefault((id(original), slides), view)
        self._modules = [module for module, _ in found]
        self._layers = _layers(decoder)

    def restore(self, decoder: PreTrainedModel) -> None:
        """Give all modules their own config back, copies of theirs as well."""
        modules = {id(module): module for module in (*self._modules, *decoder.modules())}
        for module in modules.values():
            _restore(module)
        self._modules, self._layers = [], ()

    def outdated(self, decoder: PreTrainedModel) -> str | None:
        """Why the stack cannot run shared with these views any more; None if it can."""
        if any(getattr(module, "is_causal", True) is False for module in self._modules):
            return "bidirectional attention"
        if _layers(decoder) != self._layers:
            found = list(_attention(decoder))
            if not all(_fits(module, slides) and _has_window(module) for module, slides in found):
                return LAYERS_CHANGED
            self.give(decoder)  # wrapped, or changed in what attention does not depend on
        return None


def _restore(module: nn.Module) -> None:
    config = getattr(module, "config", None)
    if isinstance(config, _SharedAttentionConfig):
        module.config = config.prefix_sharing_original


def _fits(module: nn.Module, slides: bool | None) -> bool:
    view: Any = module.config
    if not isinstance(view, _SharedAttentionConfig):
        return False
    # A window that is taken away while layers have one kind is read at every call.
    unnamed = named_layer_types(view) is None and sliding_window(view) is None
    return view.prefix_sharing_slides == slides or (bool(view.prefix_sharing_slides) and unnamed)


def _has_window(module: nn.Module) -> bool:
    """Whether a window that a module has kept from its config is still the one there, which masks
    are made from."""
    view: Any = module.config
    kept = getattr(module, "sliding_window", None)
    return kept is None or not view.prefix_sharing_slides or kept == sliding_window(view)


def _attention(decoder: PreTrainedModel) -> Iterator[tuple[nn.Module, bool | None]]:
    """Attention modules, and whether they have a sliding window.

    transformers takes the mask of a layer by its place in the stack. Modules know the place that
    they were made for.
    """
    for name, module in decoder.named_modules():
        config: Any = getattr(module, "config", None)
        if config is None or module is decoder or not is_attention(module):
            continue
        layer = getattr(module, "layer_idx", None)
        if layer is not None:
            layer = next(map(int, filter(str.isdecimal, name.split("."))), layer)
        yield module, None if layer is None else layer_slides(config, layer)


def _layers(decoder: PreTrainedModel) -> tuple[Any, ...]:
    """What says which kind of attention is where: layers in their lists, and the config."""
    parts = [x for child in decoder.children() for x in (child, *child.children())]
    lists = [tuple(x) for x in parts if isinstance(x, nn.ModuleList)]
    config = decoder.config
    return lists, list(named_layer_types(config) or ()), sliding_window(config)
