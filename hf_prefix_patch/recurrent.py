"""Recurrent layers that follow the tree: all that is known here of the package tree-recurrence.

Gated DeltaNet, Mamba2 and short convolutions scan their row in order and would carry the state of
one branch into the next. The package makes each segment start from the state that its parent ends
in, by hooks on the functions that such layers call, shared by all models of one modeling file. They
read the `tree_*` arguments of a packed call and let every other call pass.
"""

from __future__ import annotations

import importlib.util
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.features import is_recurrent
from hf_prefix_patch.support import refusal

_CARRIED = "whose state would carry the chosen response into the rejected"


class TreeRecurrence:
    """The recurrent layers of one decoder stack, which follow the tree while this object lives.

    The patch holds it, and so do the arguments of every packed call: a checkpointed layer may run
    again when the patch is gone, and without the hooks it would run through all branches as one.
    A deep copy of a patched model gets one of its own.

    Attributes:
        sees_padding: whether its layers make something of the padding before a row, which they set
            to zero: a bias is added to that before the convolution looks back at it.
    """

    def __init__(self, layers: nn.Module) -> None:
        """Install the package's hooks for the modules in `layers`, which has their `config`.

        Raises:
            NotImplementedError: the package cannot make all of them follow the tree.
        """
        import tree_recurrence

        self._layers = layers
        # Before installing: what fails halfway is undone too.
        undo = weakref.finalize(self, tree_recurrence.uninstall, layers)
        undo.atexit = False
        support = tree_recurrence.install(layers)
        if support.mode != "tree" or not support.owners:
            undo()
            raise refusal(
                str(getattr(layers, "name", "the model")),
                f"has recurrent layers, {_CARRIED}, and tree-recurrence "
                f"{tree_recurrence.__version__} does not make them follow the tree "
                f"({support.reason})",
                "layers that follow it",
            )
        mixers = {name for family in tree_recurrence.families() for name in family.mixers}
        self.sees_padding = any(
            isinstance(module, nn.Linear) and module.bias is not None
            for mixer in layers.modules()
            if type(mixer).__name__ in mixers
            for module in mixer.modules()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TreeRecurrence, (self._layers,)


def recurrence_of(backbone: PreTrainedModel) -> TreeRecurrence | None:
    """Make the recurrent layers of a decoder stack follow the tree; None if it has none.

    Raises:
        NotImplementedError: the package is missing, or cannot do it.
    """
    if not is_recurrent(backbone):
        return None
    name = type(backbone).__name__
    if importlib.util.find_spec("tree_recurrence") is None:
        raise refusal(
            name,
            f"has recurrent layers, {_CARRIED}",
            "the package tree-recurrence, which makes some follow the tree",
            "pip install tree-recurrence, or run it unpatched",
        )
    return TreeRecurrence(_Layers(backbone))


class _Layers(nn.Module):
    """The children of a decoder stack.

    The package keeps account of the models that it was installed for. This stands for the patched
    one, so that the account of a user who installed it for the model itself stays as it is.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.config, self.name = backbone.config, type(backbone).__name__
        self._modules.update(backbone.named_children())
