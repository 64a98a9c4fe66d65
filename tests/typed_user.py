"""A program with types, for mypy against an installed wheel: it sees ours, and so finds mistakes.

An `ignore` that has nothing to ignore is an error too.
"""

from typing import assert_type

from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharing,
    PrefixTree,
    completion_logps,
    enable_prefix_sharing,
)


def use(model: PreTrainedModel, rows: Tensor, mask: Tensor) -> None:
    with enable_prefix_sharing(model) as sharing:
        assert_type(sharing, PrefixSharing)
        assert_type(sharing.stats.sharing_ratio, float)
    tree = PrefixTree.from_rows(rows, mask)
    assert_type(tree.pack(rows), Tensor)
    collator = DataCollatorWithPrefixSharing(pad_token_id=0)
    assert_type(completion_logps(model, collator([])), Tensor)
    enable_prefix_sharing(model, verify="yes")  # type: ignore[arg-type]
    enable_prefix_sharing(model, on_bypass="stop")  # type: ignore[arg-type]
    enable_prefix_sharing(model, max_tokens=64)  # type: ignore[call-arg]
