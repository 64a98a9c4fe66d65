"""Token ids of preference pairs, from strings or messages, as TRL's `DPOTrainer` makes them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_prefix_patch.columns import REFERENCE_LOGPS, TruncationMode, check_truncation_mode
from hf_prefix_patch.options import check_counts
from hf_prefix_patch.pair_files import read_file, read_folder
from hf_prefix_patch.preferences import CUT, IDS, encode

logger = logging.getLogger(__name__)

_TOGETHER = 32  # examples in one call of the tokenizer; a fast one spreads its texts over the cores
_DESCRIPTION = "Tokenising preferences"


def tokenize_preferences(
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    progress: bool = True,
) -> Any:
    """Token ids of preference pairs, equal to those in the data set of TRL 1.16's `DPOTrainer`.

    An example has `prompt`, `chosen` and `rejected`, all strings or all lists of messages, and
    beside messages perhaps `tools` (a list, or JSON of one) and `chat_template_kwargs`. Without
    `prompt`, or where it is None, chosen and rejected begin with it: it is their common start.
    Strings get an EOS token at the end. The answers begin where the tokens of the prompt alone and
    those of prompt and answer part; where that takes the end off a prompt, a warning says so.

    No ids are cut to `max_length`: give it to the collator too, which cuts whole rows. With
    "keep_start" that leaves no token of an answer whose prompt alone fills `max_length`, so such
    examples are left out here, and a line of the log says how many.

    Args:
        data: path of a file (JSONL in UTF-8, JSON with an array of objects, Parquet) or of a folder
            saved by `datasets` (of several splits, "train"); a `datasets.Dataset`; or an iterable
            of examples.
        tokenizer: a tokenizer of transformers, with a chat template for messages or an EOS token
            for strings.
        max_length: longest row, prompt and answer, in tokens; None for any length.
        truncation_mode: the end of a row that the collator keeps.
        num_proc: processes, for a `Dataset` or a folder only. Without them a fast tokenizer still
            uses all cores.
        progress: whether to show a progress bar.

    Returns:
        A `Dataset` for a `Dataset`: the columns it had, and `prompt_ids`, `chosen_ids` and
        `rejected_ids`. Otherwise a list of dicts with these lists of int, and with
        `ref_chosen_logps` and `ref_rejected_logps` where an example has them.

    Raises:
        FileNotFoundError: no such path, or a folder that `datasets` did not save.
        ModuleNotFoundError: a folder, but `datasets` is not installed; Parquet, but no `pyarrow`.
        TypeError: `data` is a mapping, or an example is none; `tokenizer` is a string or processor.
        ValueError: an option out of range; a file of another kind, or one that is not what its name
            says or was written in part, with the line; no example, or one that lacks chosen or
            rejected, has images, mixes strings and messages, has no prompt message or repeats them
            in chosen, or has no token in an answer; a tokenizer without what it must have.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = {"<eos>": 0, "two": 1, "and": 2, "is": 3, "four": 4, "five": 5}
        >>> backend = Tokenizer(models.WordLevel(words))
        >>> backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
        >>> pair = {"prompt": "two and two is ", "chosen": "four", "rejected": "five"}
        >>> tokenize_preferences([pair], tokenizer, progress=False)
        [{'prompt_ids': [1, 2, 1, 3], 'chosen_ids': [4, 0], 'rejected_ids': [5, 0]}]
    """
    check_truncation_mode(truncation_mode)
    if isinstance(tokenizer, str):
        raise TypeError(
            f"tokenizer is {tokenizer!r}, a string, but must be a tokenizer; give "
            "AutoTokenizer.from_pretrained of it"
        )
    if not callable(tokenizer):
        raise TypeError(
            f"tokenizer is {tokenizer!r}, but must be a tokenizer of transformers; give "
            "AutoTokenizer.from_pretrained of the model"
        )
    if hasattr(tokenizer, "tokenizer"):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, but must be a tokenizer, as text alone "
            "becomes token ids; give processor.tokenizer"
        )
    check_counts(max_length=max_length, num_proc=num_proc)
    limit = max_length if truncation_mode == "keep_start" else None
    path = Path(data) if isinstance(data, str | os.PathLike) else None
    saved = read_folder(path) if path is not None and path.is_dir() else None
    if saved is not None or _is_dataset(data):
        pairs, cuts = _map(data if saved is None else saved, tokenizer, limit, num_proc, progress)
    elif num_proc is not None:
        raise ValueError(
            f"num_proc is {num_proc}, but only a datasets.Dataset or a folder of one is tokenised "
            "in processes; leave num_proc out, or give datasets.Dataset.from_list(examples)"
        )
    else:
        items, total = _numbered(data) if path is None else _of_file(path)
        pairs, cuts = _loop(items, total, tokenizer, limit, progress)
    if not cuts:
        raise ValueError(
            f"{path or 'data'} holds no example, but must hold at least one; check how it is made"
        )
    report_cuts(cuts, len(cuts) - len(pairs), limit)
    if saved is None:
        return pairs
    names = [name for name in (*IDS, *REFERENCE_LOGPS) if name in pairs.column_names]
    return pairs.select_columns(names).to_list()


def _is_dataset(data: Any) -> bool:
    """Whether it is a `datasets.Dataset`; never imports `datasets` itself."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, module.Dataset)


def _of_file(path: Path) -> tuple[Iterable[tuple[str, Any]], int]:
    items = read_file(path)
    return items, len(items)


def _numbered(data: Any) -> tuple[Iterable[tuple[str, Any]], int | None]:
    """The same for an iterable, whose number may be unknown."""
    if isinstance(data, Mapping):
        raise TypeError(
            f"data is a {type(data).__name__} with the keys {sorted(data)}, but must be a path, a "
            "Dataset or an iterable of examples; of a DatasetDict give one split"
        )
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data is a {type(data).__name__}, but must be a path, a Dataset or an iterable of "
            "examples; give one of these"
        )
    total = len(data) if isinstance(data, Sized) else None
    return ((f"example {i}", example) for i, example in enumerate(data)), total


def _loop(
    items: Iterable[tuple[str, Any]],
    total: int | None,
    tokenizer: Any,
    limit: int | None,
    progress: bool,
) -> tuple[list[dict[str, Any]], list[str | None]]:
    """Records of the examples within the limit, and the cuts of all."""
    records, cuts = [], []
    for example, record, cut in encoded(items, total, tokenizer, progress):
        cuts.append(cut)
        if limit is None or len(record["prompt_ids"]) < limit:
            record |= {name: example[name] for name in REFERENCE_LOGPS if name in example}
            records.append(record)
    return records, cuts


def encoded(
    items: Iterable[tuple[str, Any]], total: int | None, tokenizer: Any, progress: bool
) -> Iterator[tuple[Any, dict[str, Any], str | None]]:
    """Each example, given with its place for messages, its record of `IDS`, and its `CUT`."""
    remaining = iter(items)
    with tqdm(total=total, desc=_DESCRIPTION, unit=" examples", disable=not progress) as bar:
        while batch := list(islice(remaining, _TOGETHER)):
            for (_, example), record in zip(batch, encode(batch, tokenizer), strict=True):
                yield example, record, record.pop(CUT)
            bar.update(len(batch))


def _map(
    dataset: Any, tokenizer: Any, limit: int | None, num_proc: int | None, progress: bool
) -> tuple[Any, list[str | None]]:
    """The same for a `Dataset`, all columns kept."""
    import datasets  # type: ignore[import-untyped]

    if not len(dataset):
        return dataset, []
    features = dataset.features.copy()  # given, as none can be inferred from a run of empty prompts
    ids = datasets.Sequence(datasets.Value("int64"))
    features.update(dict.fromkeys(IDS, ids) | {CUT: datasets.Value("string")})
    with _bars(progress):
        pairs = dataset.map(
            _encode_columns,
            with_indices=True,
            batched=True,
            batch_size=_TOGETHER,
            fn_kwargs={"tokenizer": tokenizer},
            features=features,
            num_proc=num_proc,
            desc=_DESCRIPTION,
        )
        # A column, since a worker's warnings, and those of a cached call, would not be seen.
        cuts = list(pairs[CUT])
        pairs = pairs.remove_columns(CUT)
        if limit is not None:
            pairs = pairs.filter(
                lambda ids: len(ids) < limit,
                input_columns="prompt_ids",
                num_proc=num_proc,
                desc="Leaving out prompts that fill max_length",
            )
    return pairs, cuts


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The progress bars of `datasets` as they are, or hidden."""
    import datasets

    hide = not shown and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _encode_columns(
    batch: Mapping[str, list[Any]], indices: list[int], tokenizer: Any
) -> dict[str, list[Any]]:
    examples = [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]
    items = [(f"example {i}", example) for i, example in zip(indices, examples, strict=True)]
    records = encode(items, tokenizer)
    return {name: [record[name] for record in records] for name in (*IDS, CUT)}


def report_cuts(cuts: Sequence[str | None], left_out: int = 0, limit: int | None = None) -> None:
    """Warn of prompts that lost their end or are empty; say how many examples were left out."""
    ends = [cut for cut in cuts if cut]
    if ends:
        # A warning, as there is something to mend; leaving out is what max_length asked for.
        warnings.warn(
            f"in {len(ends)} of {len(cuts)} examples the prompt alone ends in other tokens than "
            f"before an answer; that end ({ends[0]} in the first) is left out, as TRL does, so the "
            "model trains on another prompt than it is later given; sharing is not concerned: use "
            "a chat template that renders prompts the same in both places, or end prompts between "
            "tokens",
            stacklevel=3,
        )
    empty = sum(cut is None for cut in cuts)
    if empty:
        warnings.warn(
            f"{empty} of {len(cuts)} examples have no prompt: it is empty, or there is no column "
            "of that name and the answers do not begin alike; if the column has another name, "
            "rename it to prompt",
            stacklevel=3,
        )
    if left_out:
        logger.warning(
            "%d of %d examples left out, as their prompt alone fills max_length=%d tokens",
            left_out,
            len(cuts),
            limit,
        )
