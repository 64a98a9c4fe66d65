"""Preference pairs to measure on: real ones from files, synthetic ones by length, rows of both."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import exp, log
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from hf_prefix_patch.tokenization import tokenize_preferences

MODES = ("padded", "packed", "in pairs", "across")
RESERVED = 256
"""Token ids below this one stand for first tokens that must not be shared; no pair has them."""


@dataclass(frozen=True)
class Pair:
    """Token ids of one preference pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Batch:
    """`[R, L]` right-padded rows, all chosen before all rejected ones, as TRL lays them out."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    @property
    def rows(self) -> list[list[int]]:
        """Real tokens of each row."""
        lengths = self.attention_mask.sum(1).tolist()
        return [ids[:n] for ids, n in zip(self.input_ids.tolist(), lengths, strict=True)]

    def marked(self, first: Sequence[int]) -> "Batch":
        """The same rows with other first tokens, so that rows share only where those agree."""
        ids = self.input_ids.clone()
        ids[:, 0] = torch.tensor(first, device=ids.device)
        return Batch(ids, self.attention_mask, self.completion_mask)


def collate(pairs: Sequence[Pair], max_length: int, device: str = "cpu") -> Batch:
    """Rows of a batch, cut at the end to `max_length` tokens (TRL's `keep_start`)."""
    answers = [*((p.prompt, p.chosen) for p in pairs), *((p.prompt, p.rejected) for p in pairs)]
    rows = [(prompt + answer)[:max_length] for prompt, answer in answers]
    length = max(map(len, rows))
    ids, mask, completion = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for r, (row, (prompt, _)) in enumerate(zip(rows, answers, strict=True)):
        ids[r, : len(row)] = torch.tensor(row)
        mask[r, : len(row)] = 1
        completion[r, len(prompt) : len(row)] = 1
    return Batch(ids.to(device), mask.to(device), completion.to(device))


def in_mode(batch: Batch, mode: str) -> tuple[Batch, int]:
    """The batch with the first tokens of a mode, and the tokens that the decoder then runs on."""
    count = len(batch.input_ids)
    pairs = count // 2
    if mode == "padded":
        return batch, batch.input_ids.numel()
    if mode == "packed":
        return batch.marked(range(count)), int(batch.attention_mask.sum())
    if mode == "across":
        return batch, distinct_prefixes(batch.rows)
    marked = batch.marked([i % pairs for i in range(count)])
    rows = marked.rows
    return marked, sum(distinct_prefixes([rows[i], rows[i + pairs]]) for i in range(pairs))


def synthetic_pairs(
    count: int, median: float, ratio: float, sigma: float, vocab: int
) -> list[Pair]:
    """Random tokens whose lengths have the given medians.

    Prompt and answer together are log-normal around `median` with `sigma` and split by `ratio`
    (prompt over answer); the two answers of a pair vary around their part with half of `sigma`.
    Lengths are the quantiles of those distributions in random order, not independent draws, so
    that a few pairs have the medians too.
    """
    generator = random.Random(0)
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    whole, chosen, rejected = (generator.sample(quantiles, count) for _ in range(3))

    def draw(length: float) -> list[int]:
        return generator.choices(range(RESERVED, vocab), k=max(1, round(length)))

    pairs = []
    for i in range(count):
        length = exp(log(median) + sigma * whole[i])
        answer = length / (1 + ratio)
        answers = [draw(answer * exp(sigma / 2 * z[i])) for z in (chosen, rejected)]
        pairs.append(Pair(draw(length - answer), *answers))
    return pairs


def load_tokenizer(path: str | None) -> Any:
    """The tokenizer in a folder, or that of SmolLM2."""
    from transformers import AutoTokenizer

    if path is None:
        sys.path.append(str(Path(__file__).parents[1] / "examples"))
        from smollm2 import smollm2_path

        path = str(smollm2_path())
    return AutoTokenizer.from_pretrained(path)


def read_pairs(
    path: Path, tokenizer: Any, count: int, max_length: int, shuffle: bool = True
) -> list[Pair]:
    """Pairs of a JSONL file with prompt, chosen and rejected: strings, or lists of messages.

    Pairs whose prompt fills `max_length` are left out, as in TRL's `DPOTrainer`.

    Raises:
        ValueError: fewer than `count` pairs are left.
    """
    with path.open(encoding="utf-8") as file:
        examples = [json.loads(line) for line in file if line.strip()]
    if shuffle:
        random.Random(0).shuffle(examples)
    pairs: list[Pair] = []
    remaining = iter(examples)
    # No more than are needed: files are long, and `count` is often small.
    while some := list(islice(remaining, count - len(pairs))):
        tokenized = tokenize_preferences(some, tokenizer, max_length=max_length, progress=False)
        pairs += [Pair(x["prompt_ids"], x["chosen_ids"], x["rejected_ids"]) for x in tokenized]
    if len(pairs) < count:
        raise ValueError(
            f"{path} has {len(pairs)} pairs with a prompt below {max_length} tokens, but {count} "
            "are needed; raise --max-length or lower --pairs and --batches"
        )
    return pairs


def renumber(pairs: Sequence[Pair], vocab: int) -> list[Pair]:
    """The pairs with their tokens numbered from `RESERVED`, for a model with a small vocabulary.

    Raises:
        ValueError: they have more distinct tokens than that holds.
    """
    used = sorted({t for p in pairs for t in chain(p.prompt, p.chosen, p.rejected)})
    if RESERVED + len(used) > vocab:
        raise ValueError(
            f"the pairs have {len(used)} distinct tokens, but a vocabulary of {vocab} holds "
            f"{vocab - RESERVED}; give --vocab {RESERVED + len(used)} or more"
        )
    new = {token: RESERVED + i for i, token in enumerate(used)}
    return [
        Pair(*([new[t] for t in ids] for ids in (p.prompt, p.chosen, p.rejected))) for p in pairs
    ]


def distinct_prefixes(rows: Sequence[list[int]]) -> int:
    """Tokens of the rows when a common prefix counts once; a check on what the library packs."""
    prefixes: dict[tuple[int, int], int] = {}  # (number of the prefix before, token) to its number
    for row in rows:
        number = 0
        for token in row:
            number = prefixes.setdefault((number, token), len(prefixes) + 1)
    return len(prefixes)
