"""The collator: tokenised examples to a batch with its plan, made in the data loader's worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from inspect import isroutine
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding

from hf_prefix_patch.attention import EMPTY_MASK
from hf_prefix_patch.columns import (
    REFERENCE_LOGPS,
    Row,
    TruncationMode,
    check_truncation_mode,
    rows_of,
)
from hf_prefix_patch.options import check_counts
from hf_prefix_patch.planned import PlannedTensor, attach_plan
from hf_prefix_patch.plans import ROW_INPUTS, Plan
from hf_prefix_patch.rows import HostRows
from hf_prefix_patch.tree import PrefixTree

Layout = Literal["rows", "packed"]


@dataclass
class DataCollatorWithPrefixSharing:
    """Preference pairs to a batch that brings its own plan.

    In place of the `DataCollatorForPreference` of TRL's DPO (reward modelling has another one of
    that name): the same arguments, examples and tensors. The token comparison that a patched model
    would make for each batch is made here, where a data loader runs it in its workers; `input_ids`
    and `attention_mask` carry the result to the model, through pinned memory and moves between
    devices.

    Examples hold `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of token ids, and optionally
    `ref_chosen_logps` and `ref_rejected_logps`, which are passed on. The older `*_input_ids` mean
    the same, where answers that both begin with the prompt are taken for rows that have it already.
    For `B` pairs the batch has `R = 2 B` rows, all chosen ones first.

    With `layout="rows"`, a dict as TRL's, int64, padded on the right:

    - `input_ids`, `attention_mask`, `completion_mask`: `[R, L]`.

    With `layout="packed"`, for a loop of one's own, a `BatchEncoding` (it has `.to(device)`) that a
    patched model takes as `model(**batch)`; it gives logits `[1, N, vocab]`. An unpatched model
    raises.

    - `input_ids`, `position_ids`: `[1, N]`, each shared prefix once, no padding.
    - `tree_kv_index`, `tree_cu_seqlens_q`, `tree_cu_seqlens_k`, `tree_max_seqlen_q`,
      `tree_max_seqlen_k`: descriptors, see `PrefixTree.model_kwargs`.
    - `logit_index`, `logit_labels`: `[U]`, for each distinct completion token the packed position
      of the logits that predict it, and the token. `model(**batch,
      logits_to_keep=batch["logit_index"])` makes these logits alone.
    - `completion_index`: `[C]`, for each completion token, row by row, which of the `U` it is.
    - `completion_lengths`: `[R]`, completion tokens in each row.

    `completion_logps` takes either layout.

    Args:
        pad_token_id: fills the rows up; may be None with `layout="packed"`, which has no padding.
        max_length: longer rows are cut; None for any length.
        truncation_mode: `"keep_start"` or `"keep_end"` of a row; the latter cuts the two rows of a
            pair differently, which then share little.
        pad_to_multiple_of: of the row length.
        layout: `"rows"` or `"packed"`.

    Raises:
        ValueError: an option out of range, no examples, examples without the columns above or
            with no token at all, or reference log-probs that only some have or that are not finite.
        TypeError: an option or a column of another type.

    Examples:
        >>> collator = DataCollatorWithPrefixSharing(pad_token_id=0)
        >>> pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
        >>> batch = collator([pair])
        >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
        ([[5, 6, 7, 0], [5, 6, 8, 9]], [[0, 0, 1, 0], [0, 0, 1, 1]])
        >>> batch["input_ids"].prefix_tree.packed_tokens
        5
        >>> packed = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")([pair])
        >>> packed["input_ids"].tolist(), packed["position_ids"].tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]])
        >>> packed["logit_index"].tolist(), packed["logit_labels"].tolist()
        ([1, 1, 3], [7, 8, 9])
    """

    pad_token_id: int | None
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    pad_to_multiple_of: int | None = None
    layout: Layout = "rows"

    def __post_init__(self) -> None:
        check_truncation_mode(self.truncation_mode)
        if self.layout not in get_args(Layout):
            raise ValueError(
                f"layout is {self.layout!r}, but must be one of {get_args(Layout)}; leave it out "
                "for rows"
            )
        if self.pad_token_id is None and self.layout == "rows":
            raise ValueError(
                "pad_token_id is None, but rows are filled up with it; pass the tokenizer's "
                "pad_token_id or, if it has none, its eos_token_id"
            )
        if self.pad_token_id is not None and (
            isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, Integral)
        ):
            raise TypeError(
                f"pad_token_id is a {type(self.pad_token_id).__name__}, but must be a token id, an "
                "integer; pass tokenizer.pad_token_id"
            )
        if self.pad_token_id is not None and int(self.pad_token_id) < 0:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, but must be a token id from 0 on, as the "
                "model embeds padding too; pass tokenizer.pad_token_id"
            )
        check_counts(max_length=self.max_length, pad_to_multiple_of=self.pad_to_multiple_of)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> MutableMapping[str, Any]:
        """Collate `B` examples; see the class."""
        given: Any = examples
        if isinstance(given, Mapping):
            raise TypeError(
                f"got a mapping with the keys {sorted(given)}, but a batch is made of a list of "
                "examples; pass a list of mappings, one for each example"
            )
        if not examples:
            raise ValueError(
                "got no examples, but a batch needs at least one; check how batches are drawn"
            )
        by_example = [
            rows_of(x, self.max_length, self.truncation_mode, f"example {i} of the batch")
            for i, x in enumerate(examples)
        ]
        for i, example in enumerate(by_example):
            if len(example) != len(by_example[0]):
                raise ValueError(
                    f"example {i} of the batch is of {len(example)} rows and the first of "
                    f"{len(by_example[0])}, but all must be pairs, or all single rows; give "
                    "examples of the same columns"
                )
        rows = [row for column in zip(*by_example, strict=True) for row in column]
        ids, real, completion = self._pad(rows)
        plan = Plan.of_host_rows(HostRows(ids, real))
        if plan.tree is None:
            raise ValueError(
                f"{len(examples)} examples have {plan.reason}, but a batch needs one; leave empty "
                "ones out"
            )
        if not completion.any(1).all():
            # As TRL's collator has it. One text, which Python's default filter shows once.
            warnings.warn(
                "a row has no completion token, but needs one to train on: its log-prob is 0. Its "
                "answer is empty, or max_length cut it away; leave such pairs out, as "
                "tokenize_preferences(max_length=...) does, or raise max_length",
                stacklevel=2,
            )
        passed_on = _reference_logps(examples)
        if self.layout == "packed":
            return BatchEncoding(_packed_batch(plan, ids, completion) | passed_on)
        mask, of_completion = (torch.from_numpy(x.astype(np.int64)) for x in (real, completion))
        planned = attach_plan(plan, {"input_ids": torch.from_numpy(ids), "attention_mask": mask})
        return {**planned, "completion_mask": of_completion, **passed_on}

    @staticmethod
    def wrap(collator: Callable[..., Any]) -> Callable[..., Any]:
        """Another collator with the plan of the rows that it makes.

        Every `[R, L]` tensor whose name ends in `input_ids` is planned, together with the
        `attention_mask` and `position_ids` beside it: batches of reward, KTO and language model
        trainers, or one's own. All else stays as it is, batches that are no mapping too.

        Args:
            collator: takes a list of examples and returns a batch.

        Raises:
            TypeError: what cannot be called.

        Examples:
            >>> def collator(examples):
            ...     return {"input_ids": torch.tensor(examples)}
            >>> batch = DataCollatorWithPrefixSharing.wrap(collator)([[5, 6, 7], [5, 6, 8]])
            >>> batch["input_ids"].prefix_tree.packed_tokens
            4
        """
        if not callable(collator):
            raise TypeError(
                f"collator is a {type(collator).__name__}, but must be a function of a list of "
                "examples; pass a collator, or use DataCollatorWithPrefixSharing itself"
            )
        planned = isinstance(collator, DataCollatorWithPrefixSharing | PlanningCollator)
        return collator if planned else PlanningCollator(collator)

    def _pad(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, int64, and which cells are real and of completions, bool, `[R, L]` each."""
        length = max(len(row.ids) for row in rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        ids = np.full(shape, self.pad_token_id or 0, np.int64)
        lengths = np.array([[len(row.ids)] for row in rows])
        prompts = np.array([[row.prompt_length] for row in rows])
        for line, row in zip(ids, rows, strict=True):
            line[: len(row.ids)] = row.ids
        real = np.arange(length) < lengths
        completion = real & (np.arange(length) >= prompts)
        return ids, real, completion


class PlanningCollator:
    """A collator whose batches carry the plan of their rows; see `wrap`.

    To everything else it is that collator: trainers ask for its class and set its attributes.
    """

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collator(*args, **kwargs)
        if not isinstance(batch, MutableMapping):
            return batch
        for ending in [name for name in batch if name.endswith("input_ids")]:
            kind = ending.removesuffix("input_ids")
            rows = {name: batch[kind + name] for name in ROW_INPUTS if kind + name in batch}
            if all(map(_plannable, rows.values())):
                ids, *rest = map(rows.get, ROW_INPUTS)
                assert ids is not None
                plan = Plan.of_rows(ids, *rest)
                for name, x in attach_plan(plan, rows).items():
                    batch[kind + name] = x
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):  # before __init__: copying
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "collator":
            object.__setattr__(self, name, value)
        else:
            setattr(self.collator, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return PlanningCollator if isroutine(self.collator) else type(self.collator)

    def __reduce__(self) -> tuple[type[PlanningCollator], tuple[Callable[..., Any]]]:
        return PlanningCollator, (self.collator,)


def _reference_logps(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """`[B]` each, of those columns that the examples have."""
    found = {}
    for name in REFERENCE_LOGPS:
        having = sum(name in example for example in examples)
        if having == len(examples):
            found[name] = _finite(name, [example[name] for example in examples])
        elif having:
            raise ValueError(
                f"{having} of {len(examples)} examples have {name}, but all or none must; compute "
                "the reference log-probs of the others, or drop the column"
            )
    return found


def _finite(name: str, values: list[Any]) -> Tensor:
    for i, x in enumerate(values):
        number = isinstance(x, Real) or (isinstance(x, Tensor | np.ndarray) and x.ndim == 0)
        if not number or not isfinite(x):
            raise ValueError(
                f"{name} of example {i} of the batch is {x!r}, but must be a finite number; "
                "compute the reference log-probs again, or drop the column"
            )
    return torch.tensor(values, device="cpu")


def _plannable(x: Any) -> bool:
    plain = isinstance(x, Tensor) and not isinstance(x, PlannedTensor)
    return plain and x.ndim == 2 and not x.is_floating_point()


def _packed_batch(plan: Plan, ids: np.ndarray, completion: np.ndarray) -> dict[str, Any]:
    """The packed row, its descriptors, and where the completion tokens of its rows are."""
    tree = plan.tree
    assert isinstance(tree, PrefixTree)
    packed = np.empty(ids.size, np.int64)
    packed[tree.cell.numpy()] = tree.packed_index.numpy()
    completion[:, 0] = False  # nothing stands before it
    cells = np.flatnonzero(completion)
    predicted = np.zeros(tree.packed_tokens, bool)
    predicted[packed[cells]] = True
    first = tree.source.numpy()[predicted]  # cells that the distinct tokens are read from
    arrays = {
        "logit_index": packed[first - 1],
        "logit_labels": ids.reshape(-1)[first],
        "completion_index": (np.cumsum(predicted) - 1)[packed[cells]],
        "completion_lengths": completion.sum(1),
    }
    call = {"input_ids": tree.pack(torch.from_numpy(ids)), **tree.model_kwargs()}
    planned = attach_plan(plan, {name: x for name, x in call.items() if isinstance(x, Tensor)})
    planned["input_ids"] = planned["input_ids"].as_packed_row()
    return {
        **(call | planned),
        "attention_mask": torch.zeros(EMPTY_MASK, device="cpu"),
        **{name: torch.from_numpy(x) for name, x in arrays.items()},
    }
