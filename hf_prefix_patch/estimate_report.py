"""An `Estimate` in words: a table, what to do, JSON, and a chart."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from hf_prefix_patch.estimate import Estimate

WORTH = 1.05
"""Below this speed-up, sharing is not worth it."""

_WIDTH = 99
_MORE_PAIRS = 1.25  # times those of a batch; with fewer the learning rate need not change


def names(estimate: Estimate) -> dict[str, str]:
    """A name to show for each way of running an epoch."""
    size = estimate.setting.batch_size
    return {
        "padded": "padded, as TRL runs it",
        "packed": "packed, nothing shared",
        "shared_in_pairs": "packed and shared in pairs",
        "shared_across": "packed and shared across pairs",
        "sampler_pairs": f"the same, sampler of {size} pairs",
        "sampler_tokens": f"the same, sampler of {estimate.max_tokens:,} tokens",
    }


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """Everything, in types that JSON has; docs/estimate.md says what each entry is."""
    data, shape = estimate.data, estimate.shape
    kept = len(data.pairs)
    model = None
    if shape is not None:
        heads = [{"window": window, "size": size} for window, size in shape.heads.items()]
        model = {**asdict(shape), "heads": heads}
    return {
        "pairs": len(data.lengths),
        "pairs_left_out": len(data.lengths) - kept,
        "rows_cut": data.rows_cut,
        "lengths": _lengths(estimate),
        "prompt_share": _prompt_share(estimate),
        "setting": asdict(estimate.setting),
        "model": model,
        "epochs": {
            way: {
                "batches": epoch.batches,
                "pairs_per_batch": kept / epoch.batches,
                "tokens": epoch.tokens,
                "most_tokens": epoch.most_tokens,
                "most_cells": epoch.most_cells,
                "token_ratio": estimate.epochs["padded"].tokens / epoch.tokens,
                "flops": None if epoch.flops is None else epoch.flops._asdict(),
                "speed_up": estimate.speed_up(way),
            }
            for way, epoch in estimate.epochs.items()
        },
        "gain": {
            "best": estimate.best,
            "padding_removed": estimate.speed_up("packed"),
            "sharing": estimate.speed_up(estimate.best, over="packed"),
            "both": estimate.speed_up(estimate.best),
        },
        "max_tokens_per_batch": estimate.max_tokens,
        "suggested_max_tokens_per_batch": estimate.suggested_max_tokens,
        "refusal": estimate.refusal,
        "worth_it": estimate.refusal is None and estimate.sharing >= WORTH,
        "advice": advice(estimate),
    }


def as_text(estimate: Estimate) -> str:
    """What the command prints, at most 100 columns wide."""
    tables = [*_length_lines(estimate), "", *_epoch_lines(estimate)]
    sentences = [fill(x, _WIDTH) for x in (assumptions(estimate), *advice(estimate))]
    return "\n".join([*tables, "", *sentences])


def assumptions(estimate: Estimate) -> str:
    """What the speed-ups stand for."""
    setting, shape, flops = estimate.setting, estimate.shape, estimate.epochs["padded"].flops
    if shape is None or flops is None:
        return (
            "No model config was given or found beside the tokenizer, so speed-ups are ratios of "
            "tokens alone."
        )
    parts = zip(("linear layers", "attention", "LM head"), flops, strict=True)
    run = ["LoRA" if setting.frozen else "full fine-tuning"]
    run.append(f"checkpointing {'on' if setting.checkpointing else 'off'}")
    run.append("a reference forward" if setting.reference else "no reference")
    cells = {"completion": "completion tokens", "cells": "all cells of the rows"}
    run.append(f"LM head on {cells[setting.head]}" if shape.head else "no LM head")
    masked = {"sdpa": "computes what a mask hides", "flash": "leaves padding out"}
    run.append(f"attention of padded rows {masked[setting.attention]} ({setting.attention})")
    return (
        f"Speed-ups are ratios of FLOPs: {shape.name}, {_size(shape.weights)} weights that a token "
        f"meets in the decoder; {', '.join(run)}. Padded, {flops.total / 1e15:.3g} PFLOP an epoch: "
        + ", ".join(f"{name} {part / flops.total:.0%}" for name, part in parts)
        + "."
    )


def advice(estimate: Estimate) -> list[str]:
    """Sentences: what is gained and by what, whether sharing is worth it, and the budget."""
    if estimate.refusal is not None:
        return [f"Nothing of this is gained with this model: {estimate.refusal}."]
    best = estimate.best
    padding, sharing = estimate.speed_up("packed"), estimate.speed_up(best, over="packed")
    found = [
        f"Padding removed gives {padding:.2f}x, sharing {sharing:.2f}x on top of it: "
        f"{padding * sharing:.2f}x together ({names(estimate)[best]})."
    ]
    if estimate.sharing < WORTH:
        found.append(
            f"Sharing is not worth it for these pairs: {_why(estimate)}. "
            + (
                "What is gained is padding removed, which any packing does."
                if padding >= WORTH
                else "Leave the model unpatched."
            )
        )
    together = estimate.speed_up("sampler_pairs", over="shared_across")
    if together >= WORTH:
        found.append(
            "Pairs have text in common with other pairs: bringing those together with "
            f"PrefixSharingBatchSampler gains {together:.2f}x over random batches."
        )
    kept, read = len(estimate.data.pairs), len(estimate.data.lengths)
    if 2 * kept < read:
        found.append(
            f"All of this is about the {kept:,} of {read:,} pairs that are left; raise max_length "
            "to see the others."
        )
    asked = estimate.max_tokens != estimate.suggested_max_tokens
    if max(padding, estimate.sharing) < WORTH and not asked:
        return found
    return [*found, _budget(estimate), *_rows_of_budget(estimate)]


def new_figure() -> Any:
    """Where `draw` draws.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a chart takes matplotlib to draw, but that is not installed; run "
            "`pip install matplotlib`, or leave the chart out"
        ) from None
    return Figure(figsize=(10, 3.2), layout="constrained", dpi=150)


def check_chart(path: Path) -> None:
    """Refuse a path that `draw` could not write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a folder, a path in none, or a suffix that matplotlib has no format for.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--plot is {path}, but {path.parent} is no folder; make it first")
    known = new_figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known or path.is_dir():
        raise ValueError(
            f"a chart is to be written to {path}, but must have a name that ends in one of "
            f".{', .'.join(sorted(known))}; give {path.with_suffix('.png')}, for example"
        )


def draw(estimate: Estimate, path: Path) -> None:
    """A chart of tokens and speed-ups by way, as PNG or whatever else the suffix names.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure()
    labels = list(names(estimate).values())
    tokens = [epoch.tokens / 1e6 for epoch in estimate.epochs.values()]
    gains = [estimate.speed_up(way) for way in estimate.epochs]
    by = "tokens" if estimate.shape is None else "FLOPs"
    panels = {"million tokens an epoch": tokens, f"predicted speed-up, by {by}": gains}
    row = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, values), colour in zip(row, panels.items(), ("C0", "C2"), strict=True):
        bars = axes.barh(labels, values, color=colour)
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set_xlabel(title)
        axes.margins(x=0.2)
    row[0].invert_yaxis()
    figure.savefig(path)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _length_lines(estimate: Estimate) -> list[str]:
    data, limit = estimate.data, estimate.setting.max_length
    notes = [f"{len(data.lengths):,} pairs"]
    if len(data.lengths) < data.read_from:
        notes = [f"{len(data.lengths):,} of {data.read_from:,} pairs, drawn at random"]
    if limit is not None:
        notes.append(f"rows of at most {limit:,} tokens ({data.rows_cut:,} cut)")
    if len(data.pairs) < len(data.lengths):
        left_out = len(data.lengths) - len(data.pairs)
        notes.append(f"{left_out:,} pairs left out, as their prompt fills that alone")
    columns = "{:<10}" + "{:>9}" * 5
    lengths = _lengths(estimate)
    return [
        fill(", ".join(notes), _WIDTH),
        "",
        columns.format("tokens", *next(iter(lengths.values()))),
        *(columns.format(x, *(f"{n:,.0f}" for n in v.values())) for x, v in lengths.items()),
        f"Prompts are {_prompt_share(estimate):.0%} of the tokens of rows.",
    ]


def _epoch_lines(estimate: Estimate) -> list[str]:
    columns = "{:<38}{:>9}{:>12}{:>15}{:>11}{:>10}"
    header = ("an epoch", "batches", "pairs/batch", "tokens", "of padded", "speed-up")
    lines = [columns.format(*header)]
    for way, name in names(estimate).items():
        epoch = estimate.epochs[way]
        cells = (
            f"{epoch.batches:,.0f}",
            f"{len(estimate.data.pairs) / epoch.batches:.1f}",
            f"{epoch.tokens:,.0f}",
            f"{epoch.tokens / estimate.epochs['padded'].tokens:.1%}",
            f"{estimate.speed_up(way):.2f}",
        )
        lines.append(columns.format(name, *cells))
    return lines


def _lengths(estimate: Estimate) -> dict[str, dict[str, float]]:
    """Percentiles and mean of the tokens of all pairs read, uncut."""
    prompt, *answers = estimate.data.lengths.T
    columns = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    columns["row"] = np.concatenate([prompt + answer for answer in answers])
    found = {}
    for name, values in columns.items():
        points = np.percentile(values, [5, 50, 95, 100], method="nearest").tolist()
        found[name] = dict(zip(("p5", "p50", "p95", "max"), points, strict=True))
        found[name]["mean"] = float(values.mean())
    return found


def _prompt_share(estimate: Estimate) -> float:
    pairs = estimate.data.pairs
    return float(pairs.prompts.sum() / pairs.lengths.sum())


def _why(estimate: Estimate) -> str:
    """Why sharing gains little."""
    packed, best = estimate.epochs["packed"], estimate.epochs[estimate.best]
    saved = 1 - best.tokens / packed.tokens
    share = _prompt_share(estimate)
    data, setting = estimate.data, estimate.setting
    if 1 / (1 - saved) >= WORTH and packed.flops is not None:
        head = packed.flops.head / packed.flops.total
        return (
            f"it saves {saved:.0%} of the tokens, but the LM head, which it leaves as it is, is "
            f"{head:.0%} of the work"
        )
    if setting.truncation_mode == "keep_end" and 2 * data.rows_cut > len(data.pairs):
        return (
            "truncation_mode keep_end cuts the two rows of a pair by different amounts, after "
            "which they begin differently"
        )
    return (
        f"it saves {saved:.1%} of the tokens, as completions are long beside their prompts "
        f"({share:.0%} of the tokens of rows)"
    )


def _budget(estimate: Estimate) -> str:
    setting, data = estimate.setting, estimate.data
    rows = 2 * min(setting.batch_size, len(data.pairs))
    longest = int(data.pairs.lengths.max())
    suggested = (
        f"{estimate.suggested_max_tokens}: as many tokens as the largest padded batch has cells "
        f"({rows} rows of {longest})"
    )
    steps = [estimate.epochs[way].batches for way in ("padded", "sampler_tokens")]
    pairs, gain = len(data.pairs) / steps[1], estimate.speed_up("sampler_tokens")
    gives = f"{gain:.2f}x, {pairs:.1f} pairs a batch"
    gives += f", {steps[1]:,.0f} batches in place of {steps[0]:,.0f}"
    if estimate.max_tokens == estimate.suggested_max_tokens:
        found = f"Suggested budget: max_tokens_per_batch={suggested}. It gives {gives}."
    else:
        found = (
            f"max_tokens_per_batch={estimate.max_tokens} gives {gives}. Suggested for the memory "
            f"of batches of {setting.batch_size} pairs: {suggested}."
        )
    more = steps[0] / steps[1]
    if more < _MORE_PAIRS:
        return found
    return (
        f"{found} With {more:.1f} times the pairs of a batch an optimizer step has as many more: "
        "divide gradient_accumulation_steps by that, or adjust the learning rate."
    )


def _rows_of_budget(estimate: Estimate) -> list[str]:
    """A caution where the rows of a batch are more than those of padded batches."""
    cells, before = (estimate.epochs[way].most_cells for way in ("sampler_tokens", "padded"))
    if cells <= before:
        return []
    return [
        f"As rows, such a batch has up to {cells:,} cells ({cells / before:.1f} times as many), "
        "and hidden states outside the decoder are of that size. If memory runs out there, bound "
        'the pairs of a batch with sampler_options={"max_pairs": ...}.'
    ]
