"""Preference examples of strings or messages: what they must have, and their token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from hf_prefix_patch.columns import IMAGES

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
CUT = "prompt_cut"
"""Beside the ids of an example: the end that its prompt lost, quoted; empty if it lost none, and
None if no token of a prompt is there."""

_Ids = tuple[list[int], list[int], list[int]]


class _Parts(NamedTuple):
    """A checked example; `template` has the arguments of the chat template, None for strings."""

    where: str
    prompt: Any
    chosen: Any
    rejected: Any
    template: dict[str, Any] | None


def encode(items: Sequence[tuple[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Records of `IDS` and `CUT` for examples, each given with its place for messages.

    Raises:
        TypeError: an example is no mapping.
        ValueError: an example lacks what it needs, or the tokenizer does.
    """
    records = []
    for _, group in groupby((_check(*item) for item in items), lambda parts: parts.template):
        alike = list(group)
        for parts, ids in zip(alike, _encode(alike, tokenizer), strict=True):
            records.append(_record(parts, ids, tokenizer))
    return records


def _check(where: str, example: Any) -> _Parts:
    """The parts of an example, the prompt found where it is implicit."""
    if not isinstance(example, Mapping):
        raise TypeError(
            f"{where} is a {type(example).__name__}, but must be a mapping (a JSON object) with "
            "prompt, chosen and rejected; make it one or leave it out"
        )
    given = {name: value for name, value in example.items() if value is not None}
    if "chosen" not in given or "rejected" not in given:
        if "completion" in given:
            raise ValueError(
                f"{where} has the columns {sorted(given)} of unpaired data, as KTO takes it, but "
                "needs chosen and rejected; bring two answers to a prompt into one example"
            )
        raise ValueError(
            f"{where} has values in the columns {sorted(given)}, but needs chosen and rejected, "
            "and prompt unless both begin with it; rename the columns or leave the example out"
        )
    if any(given.get(name) for name in IMAGES):
        raise ValueError(
            f"{where} has images, but only text becomes token ids here; leave them to a trainer's "
            "processor, or drop the column to look at the text alone"
        )
    kinds = {name: _kind(given[name]) for name in ("prompt", "chosen", "rejected") if name in given}
    if set(kinds.values()) not in ({"a string"}, {"a list of messages"}):
        raise ValueError(
            f"{where}: {', '.join(f'{name} is {kind}' for name, kind in kinds.items())}, but all "
            "must be strings or all lists of messages with a role; where chosen and rejected are "
            "whole conversations, drop the prompt column"
        )
    prompt, chosen, rejected = given.get("prompt"), given["chosen"], given["rejected"]
    if prompt is None:
        start = _common_start(chosen, rejected)
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    elif isinstance(prompt, list) and prompt and prompt == chosen[: len(prompt)]:
        raise ValueError(
            f"{where}: chosen begins with the messages of prompt, which would be there twice, but "
            "must be what follows them; where chosen and rejected are whole conversations, drop "
            "the prompt column"
        )
    if isinstance(prompt, str):
        return _Parts(where, prompt, chosen, rejected, None)
    if not prompt:
        raise ValueError(
            f"{where} has no message before the answers, but needs one; give it as prompt, or at "
            "the start of both chosen and rejected"
        )
    return _Parts(where, prompt, chosen, rejected, _template(where, given))


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list) and all(isinstance(x, Mapping) and "role" in x for x in value):
        return "a list of messages"
    return f"a {type(value).__name__} (not of messages)"


def _template(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    tools, options = given.get("tools"), given.get("chat_template_kwargs", {})
    try:
        return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **options}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: tools is {tools!r} and chat_template_kwargs {options!r}, but they must be a "
            f"list (or JSON of one) and a mapping; correct them or leave them out ({error})"
        ) from None


def _common_start(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the prompt that two texts or two conversations begin with."""
    length = _common_length(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        return max(0, length - 1)  # one begins the other, and keeps something to answer
    # Most vocabularies have a space before a word in one token with it.
    return length - 1 if length and chosen[length - 1] == " " else length


def _common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    if a == b[: len(a)]:  # the usual case of tokens, seen without a loop
        return len(a)
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def _encode(alike: Sequence[_Parts], tokenizer: Any) -> list[_Ids]:
    """Tokens of the prompt, and of it with either answer, for examples of one template."""
    with suppress(Exception):  # raised again below, where its example is known
        return _encode_together(alike, tokenizer)
    encoded = []
    for parts in alike:
        try:
            encoded += _encode_together([parts], tokenizer)
        except Exception as error:
            if type(error).__module__.startswith("jinja2"):
                raise ValueError(
                    f"the chat template does not take {parts.where} ({error}); change its "
                    "messages, or take another tokenizer or template"
                ) from error
            error.add_note(f"raised for {parts.where}")
            raise
    return encoded


def _encode_together(alike: Sequence[_Parts], tokenizer: Any) -> list[_Ids]:
    prompts = [parts.prompt for parts in alike]
    pairs = [(parts.prompt, x) for parts in alike for x in (parts.chosen, parts.rejected)]
    template, eos = alike[0].template, tokenizer.eos_token
    if template is not None:
        apply = partial(tokenizer.apply_chat_template, return_dict=True, **template)
        starts = apply(prompts, add_generation_prompt=True)
        rows = apply([prompt + answer for prompt, answer in pairs])
    elif eos is not None:
        starts = tokenizer(prompts)
        rows = tokenizer([prompt + answer.removesuffix(eos) + eos for prompt, answer in pairs])
    else:
        raise ValueError(
            "the tokenizer has no EOS token, but an answer given as a string needs one at its end; "
            "set tokenizer.eos_token, or give messages"
        )
    ids = rows["input_ids"]
    return list(zip(starts["input_ids"], ids[::2], ids[1::2], strict=True))


def _record(parts: _Parts, ids: _Ids, tokenizer: Any) -> dict[str, Any]:
    """The answers begin where the first of them makes the tokens of the prompt differ."""
    prompt, *rows = ids
    length = min(_common_length(prompt, row) for row in rows)
    for name, row in zip(("chosen", "rejected"), rows, strict=True):
        if length == len(row):
            raise ValueError(
                f"{parts.where}: {name} has no token beyond the prompt, but needs one; give it an "
                "answer or leave the example out"
            )
    cut = "" if prompt else None
    if length < len(prompt):
        cut = repr(tokenizer.decode(prompt[length:]))
    values = (prompt[:length], *(row[length:] for row in rows), cut)
    return dict(zip((*IDS, CUT), values, strict=True))
