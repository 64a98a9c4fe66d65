"""Prefix sharing for preference fine-tuning of Hugging Face models.

enable_prefix_sharing          patch a model or a trainer, in place
disable_prefix_sharing         undo it without the handle
PrefixSharing                  the handle: .remove(), .stats, .backend
SharingStats                   what handle.stats is
tokenize_preferences           preference pairs as token ids
PrefixSharingBatchSampler      batches by token budget, pairs that share text together
DataCollatorWithPrefixSharing  batches that bring their plan, as rows or packed
completion_logps               log-probs of completions, without prompt logits
PrefixTree                     the plan of one batch: pack, unpack, descriptors
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_prefix_patch.collator import DataCollatorWithPrefixSharing
    from hf_prefix_patch.logps import completion_logps
    from hf_prefix_patch.patch import (
        PrefixSharing,
        disable_prefix_sharing,
        enable_prefix_sharing,
    )
    from hf_prefix_patch.sampler import PrefixSharingBatchSampler
    from hf_prefix_patch.stats import SharingStats
    from hf_prefix_patch.tokenization import tokenize_preferences
    from hf_prefix_patch.tree import PrefixTree

__version__ = "0.1.0"

__all__ = [
    "DataCollatorWithPrefixSharing",
    "PrefixSharing",
    "PrefixSharingBatchSampler",
    "PrefixTree",
    "SharingStats",
    "completion_logps",
    "disable_prefix_sharing",
    "enable_prefix_sharing",
    "tokenize_preferences",
]

# Imported at first use: torch and transformers take seconds, which the command line's help and
# the processes that a launched script starts should not wait for.
_HOMES = {
    "DataCollatorWithPrefixSharing": "collator",
    "PrefixSharing": "patch",
    "PrefixSharingBatchSampler": "sampler",
    "PrefixTree": "tree",
    "SharingStats": "stats",
    "completion_logps": "logps",
    "disable_prefix_sharing": "patch",
    "enable_prefix_sharing": "patch",
    "tokenize_preferences": "tokenization",
}

if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module(f"{__name__}.versions")  # names what is too old, before it is missed
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
