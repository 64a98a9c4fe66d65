"""Completions of one prompt in one micro-batch, for trainers that generate and shuffle them.

Such a trainer (GRPO, RLOO) generates several completions of each prompt, shuffles all of them and
deals them out as micro-batches. Rows that share a prompt then meet by chance only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_BUFFER = "_buffered_inputs"


class GroupedMicroBatches:
    """A trainer's `_prepare_inputs` that sorts the rows of each optimizer step by prompt.

    Rows move between the micro-batches of one optimizer step and never into another step, so a step
    sees the same rows as before. A gradient that is a sum over rows stays the same, up to rounding.

    Args:
        trainer: as `deals_out_groups` says.

    Raises:
        ValueError: a trainer that does not deal out several completions of a prompt, or whose
            micro-batches of one optimizer step come from different generations.
    """

    def __init__(self, trainer: Any) -> None:
        if not deals_out_groups(trainer):
            raise ValueError(
                f"keep_groups=True is for trainers that generate several completions of a prompt "
                f"and deal them out as micro-batches (GRPO, RLOO), but this is a "
                f"{type(trainer).__name__}; leave it out"
            )
        self._trainer = trainer
        self._prepare_inputs = trainer._prepare_inputs
        self._together = _micro_batches_together(trainer)
        if self._together == 1 and trainer.args.steps_per_generation > 1:
            raise ValueError(
                f"keep_groups=True moves rows within an optimizer step, but with "
                f"steps_per_generation={trainer.args.steps_per_generation} and "
                f"gradient_accumulation_steps={trainer.args.gradient_accumulation_steps} no two "
                "micro-batches of a step come from one generation; make them equal"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's inputs; those that were dealt out anew are regrouped first."""
        before = getattr(self._trainer, _BUFFER)
        inputs = self._prepare_inputs(*args, **kwargs)
        dealt = getattr(self._trainer, _BUFFER)
        if dealt is before or dealt is None:  # an evaluation batch, or one regrouped already
            return inputs
        size = self._together
        grouped = [
            batch
            for start in range(0, len(dealt), size)
            for batch in group_rows(dealt[start : start + size])
        ]
        setattr(self._trainer, _BUFFER, grouped)
        position = next(i for i, batch in enumerate(dealt) if batch is inputs)
        return grouped[position]


def deals_out_groups(trainer: Any) -> bool:
    """Whether a trainer deals out several completions of a prompt from a buffer."""
    names = ("steps_per_generation", "num_generations")
    return hasattr(trainer, _BUFFER) and all(hasattr(trainer.args, name) for name in names)


def grouping_advice(trainer: Any) -> str | None:
    """What to tell a user whose trainer scatters the completions of its prompts; None if not."""
    if not deals_out_groups(trainer):
        return None
    args = trainer.args
    size, group = args.per_device_train_batch_size, args.num_generations
    if args.steps_per_generation == 1 or size * args.steps_per_generation <= group:
        return None
    remedy = (
        "pass keep_groups=True"
        if _micro_batches_together(trainer) > 1
        else "make it equal to gradient_accumulation_steps and pass keep_groups=True"
    )
    return (
        f"{type(trainer).__name__} shuffles the {group} completions of each prompt over "
        f"steps_per_generation={args.steps_per_generation} micro-batches of {size}, where few of "
        f"them meet to share their prompt; {remedy}, or set steps_per_generation=1"
    )


def group_rows(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in as many batches of the same size, sorted by prompt.

    Args:
        batches: each with `prompt_ids` `[B, P]`, padded alike, and further tensors and lists of
            `B` rows; what is None or a scalar belongs to all rows.

    Raises:
        ValueError: something else, such as the images of a vision-language model.

    Examples:
        >>> rows = torch.tensor([[5], [6], [5], [6]])
        >>> first, second = group_rows([{"prompt_ids": rows[:2]}, {"prompt_ids": rows[2:]}])
        >>> first["prompt_ids"].tolist(), second["prompt_ids"].tolist()
        ([[5], [5]], [[6], [6]])
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches])
    order = torch.unique(prompts, dim=0, return_inverse=True)[1].argsort(stable=True)
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    by_name = {
        name: _reorder(name, [batch[name] for batch in batches], order, sizes)
        for name in batches[0]
    }
    return [{name: pieces[i] for name, pieces in by_name.items()} for i in range(len(batches))]


def _reorder(
    name: str, pieces: Sequence[Any], order: Tensor, sizes: Sequence[int]
) -> Sequence[Any]:
    first = pieces[0]
    if all(piece is None for piece in pieces) or _is_scalar(first):
        return pieces
    rows = [len(x) if isinstance(x, Tensor | list | tuple) else None for x in pieces]
    # TRL tells how many images each row has; with one each, they are in the order of the rows.
    images = name == "num_images" and any(n != 1 for piece in pieces for n in piece)
    if rows != list(sizes) or images:
        given = [list(piece) for piece in pieces] if images else rows
        raise ValueError(
            f"keep_groups=True moves rows between micro-batches of {list(sizes)} rows, but {name} "
            f"holds {given}, of which it is not known what belongs to which row; enable without "
            "keep_groups, and set steps_per_generation=1"
        )
    if isinstance(first, Tensor):
        return torch.split(torch.cat(list(pieces))[order], list(sizes))
    flat = [row for piece in pieces for row in piece]
    moved = iter(flat[i] for i in order.tolist())
    return [[next(moved) for _ in range(size)] for size in sizes]


def _is_scalar(x: Any) -> bool:
    return isinstance(x, int | float | str) or (isinstance(x, Tensor) and x.ndim == 0)


def _micro_batches_together(trainer: Any) -> int:
    """Micro-batches in a row that come from one generation and belong to one optimizer step.

    Steps and generations begin at multiples of their lengths, so no boundary of either falls inside
    a run of their greatest common divisor.
    """
    args = trainer.args
    return math.gcd(args.steps_per_generation, args.gradient_accumulation_steps)
