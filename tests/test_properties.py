"""Any batch at all: trees against histories written out by hand, attention and whole models against
rows that never met a tree.

How many batches: the profile of hypothesis, see conftest.py. `HYPOTHESIS_PROFILE=long` is 10,000
trees and 1,000 batches through each model.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from batches import Batch, LayerTokens, assert_same_run, assert_same_tree, run
from families import tiny_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from precision import TOLERANCE, in_doubles
from torch import Tensor

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharingBatchSampler,
    PrefixTree,
    enable_prefix_sharing,
)
from hf_prefix_patch.backends.sdpa import SDPA
from hf_prefix_patch.plans import NOTHING_TO_GAIN, Plan

IN_A_MODEL = settings(max_examples=max(1, settings().max_examples // 10))


class Rows(NamedTuple):
    """`[R, L]` int64 each; positions None where they are the columns."""

    ids: Tensor
    mask: Tensor
    positions: Tensor | None

    @property
    def histories(self) -> dict[tuple[int, int], tuple[tuple[int, int], ...]]:
        """By real cell, the (token, position) pairs of its row up to and including it."""
        columns = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        positions = (columns if self.positions is None else self.positions).tolist()
        found = {}
        for r, (ids, mask) in enumerate(zip(self.ids.tolist(), self.mask.tolist(), strict=True)):
            history: tuple[tuple[int, int], ...] = ()
            for c in [c for c, real in enumerate(mask) if real]:
                history = (*history, (ids[c], positions[r][c]))
                found[r, c] = history
        return found


@st.composite
def any_rows(draw: Any, letters: int = 3, longest: int = 9, largest: int = 2**32 - 1) -> Rows:
    """Ragged rows of few letters: empty, identical, one going on from another, of one prompt;
    padded on either side or both, over arbitrary ids; positions of all kinds."""
    letter = st.integers(3, 2 + letters)
    row = st.lists(letter, max_size=longest)
    rows = draw(st.lists(row, min_size=1, max_size=6))
    for i in range(len(rows)):
        kind = draw(st.sampled_from(["own", "own", "goes on", "parts"]))
        other = draw(st.sampled_from(rows))
        if kind == "parts":
            other = other[: draw(st.integers(0, len(other)))]
        if kind != "own":
            rows[i] = (other + rows[i])[: 2 * longest]
    assume(any(rows))
    length = max(map(len, rows)) + draw(st.integers(0, 3))
    ids = torch.tensor(
        draw(st.lists(st.integers(0, 2 + letters), min_size=length, max_size=length))
    )
    ids = ids.repeat(len(rows), 1)  # what is under padding
    mask = torch.zeros_like(ids)
    for r, tokens in enumerate(rows):
        spare = length - len(tokens)
        start = draw(st.sampled_from([0, spare, spare // 2]))
        ids[r, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[r, start : start + len(tokens)] = 1
    return Rows(ids, mask, draw(positions_of(mask, largest)))


@st.composite
def positions_of(draw: Any, mask: Tensor, largest: int) -> Tensor | None:
    """Columns, real tokens counted, all shifted, with gaps, begun again, or anything."""
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    kind = draw(st.sampled_from(["columns", "counted", "shifted", "gaps", "begun again", "any"]))
    if kind == "columns":
        return None
    if kind == "shifted":
        return counted + draw(st.integers(0, largest - counted.shape[1]))
    if kind == "gaps":
        return counted * draw(st.integers(2, 4))
    if kind == "begun again":
        return counted % draw(st.integers(1, 4))
    if kind == "any":
        few = st.sampled_from([0, 1, largest])
        size = counted.numel()
        return torch.tensor(draw(st.lists(few, min_size=size, max_size=size))).view_as(counted)
    return counted


@given(any_rows())
def test_every_token_has_its_history(rows: Rows) -> None:
    """Through the descriptors, every cell sees what its row says, in order; no token is twice."""
    tree = PrefixTree.from_rows(*rows)
    histories = rows.histories
    assert tree.packed_tokens == len(set(histories.values()))
    assert (tree.row_tokens, tree.padded_tokens) == (len(histories), rows.ids.numel())
    cu_q, cu_k, kv = (x.tolist() for x in (tree.cu_seqlens_q, tree.cu_seqlens_k, tree.kv_index))
    tokens, positions = tree.pack(rows.ids)[0].tolist(), tree.position_ids[0].tolist()
    seen = []
    for s, parent in enumerate(tree.parents):
        path = kv[cu_k[s] : cu_k[s + 1]]
        own = cu_q[s + 1] - cu_q[s]
        assert own == tree.segment_lengths[s] > 0
        assert parent < s
        assert path[-own:] == list(range(cu_q[s], cu_q[s + 1]))
        assert path[:-own] == ([] if parent < 0 else kv[cu_k[parent] : cu_k[parent + 1]])
        for i in range(own):
            seen.append(tuple((tokens[k], positions[k]) for k in path[: len(path) - own + i + 1]))
    length = rows.ids.shape[1]
    for cell, packed in zip(tree.cell.tolist(), tree.packed_index.tolist(), strict=True):
        assert seen[packed] == histories[divmod(cell, length)]
    assert tree.cell.tolist() == [r * length + c for r, c in histories]


@given(any_rows(), st.data())
def test_containers_and_types_do_not_matter(rows: Rows, data: st.DataObject) -> None:
    """The same tree from lists, arrays and tensors of any integer type; padding may hold anything;
    a planning collator and a plan of the model's own agree."""
    want = PrefixTree.from_rows(*rows)
    ids, mask, positions = rows
    junk = data.draw(st.sampled_from([0, -100, 2**31 - 1]))
    given_ids = torch.where(mask.bool(), ids, junk)
    as_ids = data.draw(
        st.sampled_from([torch.Tensor.int, torch.Tensor.long, torch.Tensor.tolist, np.asarray])
    )
    as_mask = data.draw(
        st.sampled_from(
            [torch.Tensor.bool, torch.Tensor.int, torch.Tensor.float, torch.Tensor.tolist]
        )
    )
    got = PrefixTree.from_rows(as_ids(given_ids), as_mask(mask), positions)
    assert_same_tree(got, want)
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= {} if positions is None else {"position_ids": positions}
    planned = DataCollatorWithPrefixSharing.wrap(lambda _: batch)([])["input_ids"]
    assert_same_tree(planned.prefix_tree, want)
    plan = Plan.of_rows(ids, mask, positions)
    assert (plan.reason == NOTHING_TO_GAIN) == (want.packed_tokens == ids.numel())
    firsts = [
        min(c for r, c in rows.histories if r == row) for row in {r for r, _ in rows.histories}
    ]
    assert plan.padded_before == any(firsts)
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    given_positions = columns if positions is None else positions
    beyond = given_positions.max() > given_positions[mask.bool()].max()
    assert plan.padded_beyond == bool(beyond)


@given(any_rows(), st.sampled_from([None, 1, 3]))
def test_attention_is_that_of_rows(rows: Rows, window: int | None) -> None:
    """Dense causal attention of the rows themselves, in which no tree has a part: outputs, and
    gradients of what tokens were made from, which sum over all copies of a token."""
    tree = PrefixTree.from_rows(*rows)
    real = rows.mask.bool()
    columns = torch.arange(rows.ids.shape[1])
    place = (columns.expand_as(rows.ids) if rows.positions is None else rows.positions) % 11
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(11, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    for table in tables:
        table.requires_grad_()
    direction = torch.randn(*rows.ids.shape, 2, 4, generator=generator, dtype=torch.float64)

    def features(ids: Tensor, place: Tensor) -> list[Tensor]:
        """Query `[R, 2, L, 4]`, and key and value with one head."""
        x = tables[0][ids] + tables[1][place]
        return [y.transpose(1, 2) for y in x.unflatten(2, (4, 4)).split([2, 1, 1], dim=2)]

    q, k, v = features(rows.ids, place)
    scores = 0.3 * q @ k.transpose(2, 3)
    visible = columns[:, None] >= columns
    if window is not None:
        visible &= columns[:, None] - columns < window
    scores = scores.masked_fill(~(visible & real[:, None, None]), -1e9)
    want = (scores.softmax(-1) @ v).transpose(1, 2)[real]

    packed = features(tree.pack(rows.ids), tree.pack(place))
    plan = SDPA.plan(tree, None)
    got = SDPA.attend(None, *packed, scaling=0.3, sliding_window=window, **plan)
    got = tree.unpack(got)
    assert not got[~real].any()
    torch.testing.assert_close(got[real], want, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(x, tables, direction[real]) for x in (got[real], want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "family", ["llama", "mistral-window", "gemma2", "qwen3-moe", "gpt-oss", "lfm2", "qwen3.5"]
)
def test_models_give_what_they_give_unpatched(family: str, monkeypatch: Any) -> None:
    """Log-probs and all gradients, in doubles throughout; the layers see each token once."""
    model = in_doubles(tiny_model(family), monkeypatch)
    unpatched = copy.deepcopy(model)
    seen, shared = LayerTokens(model), []
    with enable_prefix_sharing(model, verify=False, on_bypass="ignore") as sharing:

        @IN_A_MODEL
        @given(any_rows(longest=7, largest=60))
        def check(rows: Rows) -> None:
            predicted = rows.mask.clone()
            predicted[:, :1] = 0
            predicted[:, 1:] *= rows.mask[:, :-1]  # by a real token
            assume(predicted.any())
            batch = Batch(rows.ids, rows.mask, predicted)
            options = {} if rows.positions is None else {"position_ids": rows.positions}
            want, got = run(unpatched, batch, **options), run(model, batch, **options)
            assert_same_run(got, want, of_model=True, tolerance=TOLERANCE)
            packed = len(set(rows.histories.values()))
            shared.append(packed < rows.ids.numel())
            assert seen.shapes[-1] == ((1, packed) if shared[-1] else rows.ids.shape)

        check()
    assert sum(shared) == sharing.stats.calls
    assert sharing.stats.bypassed == Counter({NOTHING_TO_GAIN: len(shared) - sum(shared)})
    assert sum(shared) > 0.5 * len(shared)


IDS = st.lists(st.integers(3, 5), max_size=6)
PAIR = st.fixed_dictionaries({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS})
PAIRS = st.lists(PAIR.filter(lambda pair: any(pair.values())), min_size=1, max_size=12)


def sampler_of(*args: Any, **options: Any) -> PrefixSharingBatchSampler:
    """Other draws where pairs within the limits make no multiple of the ranks."""
    try:
        return PrefixSharingBatchSampler(*args, **options)
    except ValueError as refusal:
        assume("cannot be split into a multiple of num_replicas" not in str(refusal))
        raise


@pytest.mark.filterwarnings("ignore:a row has no completion token")
@given(PAIRS, st.data())
def test_limits_of_batches_hold_together(pairs: list[dict[str, Any]], data: st.DataObject) -> None:
    """Tokens, pairs and pairs of one prompt at once, on any number of ranks: each pair comes once,
    each limit holds as the collator counts, ranks part the steps."""

    def tokens(batch: list[int]) -> int:
        rows = DataCollatorWithPrefixSharing(pad_token_id=0)([pairs[i] for i in batch])
        return rows["input_ids"].prefix_tree.packed_tokens

    budget = max(tokens([i]) for i in range(len(pairs))) + data.draw(st.integers(0, 20))
    most, of_prompt = (data.draw(st.none() | st.integers(1, 4)) for _ in range(2))
    if not any(pair["prompt_ids"] for pair in pairs):
        of_prompt = None
    ranks = data.draw(st.integers(1, min(3, len(pairs))))
    options: dict[str, Any] = {
        "max_pairs": most,
        "max_pairs_per_prompt": of_prompt,
        "num_replicas": ranks,
        "longest_first": data.draw(st.booleans()),
        "shuffle": data.draw(st.booleans()),
        "seed": data.draw(st.integers(0, 9)),
    }
    sampler = sampler_of(pairs, budget, **options)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    assert len(batches) == len(sampler)
    assert len(batches) % ranks == 0
    for batch in batches:
        assert tokens(batch) == sampler.unique_tokens(batch) <= budget
        assert most is None or len(batch) <= most
        prompts = Counter(tuple(pairs[i]["prompt_ids"]) for i in batch)
        del prompts[()]  # which is none, and so none in common
        assert of_prompt is None or all(n <= of_prompt for n in prompts.values())
    sizes = [tokens(batch) for batch in batches]
    assert not options["longest_first"] or max(sizes) in sizes[:ranks]
    for rank in range(ranks):
        mine = PrefixSharingBatchSampler(pairs, budget, **options, rank=rank)
        assert list(mine) == batches[rank::ranks]
