"""Prefix sharing for preference fine-tuning of Hugging Face models.

enable_prefix_sharing     patch a model or a trainer, in place
disable_prefix_sharing    undo it without the handle
PrefixSharing             the handle: .remove(), .stats, .backend
PrefixTree                the plan of one batch: pack, unpack, descriptors
SharingStats              what handle.stats is
"""

from hf_prefix_patch.patch import (
    PrefixSharing,
    disable_prefix_sharing,
    enable_prefix_sharing,
)
from hf_prefix_patch.stats import SharingStats
from hf_prefix_patch.tree import PrefixTree

__version__ = "0.1.0"

__all__ = [
    "PrefixSharing",
    "PrefixTree",
    "SharingStats",
    "disable_prefix_sharing",
    "enable_prefix_sharing",
]
