"""Batches of rows, and what a preference loss reads off a model for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prefix_patch import PrefixTree
from hf_prefix_patch.reference import duplicated_rows_attention


@dataclass
class Batch:
    """`[R, L]` rows; `completion` marks the tokens whose log-probs count."""

    input_ids: Tensor
    attention_mask: Tensor
    completion: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def rows(self) -> list[list[int]]:
        """The real tokens of each row."""
        pairs = zip(self.input_ids, self.attention_mask, strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in pairs]


def preference_batch(padding: str = "right", seed: int = 0, vocab: int = 50) -> Batch:
    """Two pairs, chosen rows first. Lengths are ragged; on the left, where rows share only if they
    start in the same column, the two rows of a pair are equally long."""
    shapes = [(9, 4, 6), (7, 5, 2)] if padding == "right" else [(9, 4, 4), (7, 5, 5)]
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=generator).tolist()

    prompts = [draw(p) for p, _, _ in shapes]
    chosen = [prompt + draw(c) for prompt, (_, c, _) in zip(prompts, shapes, strict=True)]
    rejected = [prompt + draw(r) for prompt, (_, _, r) in zip(prompts, shapes, strict=True)]
    lengths = [p for p, _, _ in shapes] * 2
    return pad_rows(chosen + rejected, lengths, padding)


def pad_rows(
    rows: list[list[int]], prompt_lengths: list[int], padding: str | list[str], extra: int = 0
) -> Batch:
    """Pad to the longest row and `extra` columns more; `padding` is a side, or one for each row."""
    length = max(map(len, rows)) + extra
    sides = [padding] * len(rows) if isinstance(padding, str) else padding
    batch = Batch(*(torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3)))
    for r, (row, prompt, side) in enumerate(zip(rows, prompt_lengths, sides, strict=True)):
        start = length - len(row) if side == "left" else 0
        batch.input_ids[r, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        batch.attention_mask[r, start : start + len(row)] = 1
        batch.completion[r, start + prompt : start + len(row)] = 1
    return batch


def tree_of_rows(rows: list[list[int]]) -> PrefixTree:
    """Of rows of any length."""
    batch = pad_rows(rows, [0] * len(rows), "right")
    return PrefixTree.from_rows(batch.input_ids, batch.attention_mask)


def assert_same_tree(got: PrefixTree, want: PrefixTree) -> None:
    assert vars(got).keys() >= {"source", "cell", "kv_index", "parents"}
    for name, x in vars(want).items():
        y = getattr(got, name)
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, name


def left_padded_with_positions(vocab: int = 50) -> tuple[Batch, Tensor]:
    """A ragged batch padded on the left, where prompts begin in different columns, and positions
    `[R, L]` that count real tokens, by which they are shared all the same."""
    batch = pad_rows(preference_batch(vocab=vocab).rows, [9, 7, 9, 7], "left")
    return batch, (batch.attention_mask.cumsum(1) - 1).clamp(min=0)


def packed_inputs(
    tree: PrefixTree, heads: int = 4, kv_heads: int = 2, size: int = 8, seed: int = 0
) -> list[Tensor]:
    """Random query, key and value of the packed row, `[1, heads, N, size]` fp64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, tree.packed_tokens, size) for n in (heads, kv_heads, kv_heads)]
    draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.requires_grad_() for x in draws]


def assert_equals_duplicated_rows(
    tree: PrefixTree, got: Tensor, inputs: list[Tensor], **options: Any
) -> None:
    """Output and gradients of all `inputs` (query, key, value, and what `options` differentiates
    too) within 1e-12 of attention on duplicated rows, in fp64, scaled by 0.3."""
    want = duplicated_rows_attention(tree, *inputs[:3], scaling=0.3, **options)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    direction = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, direction),
        torch.autograd.grad(want, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def completion_logps(logits: Tensor, batch: Batch) -> Tensor:
    """`[R]` summed log-probabilities of the completion tokens of each row."""
    logps = logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(2, batch.input_ids[:, 1:, None])[..., 0]
    return (logps * batch.completion[:, 1:]).sum(1)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch.inputs, use_cache=False).logits
    return logits


def documents(batch: Batch) -> dict[str, Tensor]:
    """The rows one after another in one row without padding, told apart by their positions."""
    real = batch.attention_mask.bool()
    positions = batch.attention_mask.cumsum(1) - 1
    return {"input_ids": batch.input_ids[real][None], "position_ids": positions[real][None]}


def boundaries(batch: Batch) -> dict[str, Any]:
    """What a collator may give along with documents for flash attention and recurrent layers, by
    transformers' names."""
    sizes = batch.attention_mask.sum(1)
    ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    numbers = torch.arange(len(sizes), dtype=torch.int32, device=sizes.device)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends.clone(),
        "max_length_q": sizes.max().item(),
        "max_length_k": sizes.max().item(),
        "seq_idx": numbers.repeat_interleave(sizes)[None],
    }


def rows_of_documents(x: Tensor, batch: Batch) -> Tensor:
    """`[R, L, ...]` of `[1, T, ...]`, zeros in the padding."""
    rows = x.new_zeros(*batch.input_ids.shape, *x.shape[2:])
    rows[batch.attention_mask.bool()] = x[0]
    return rows


def run(
    model: nn.Module, batch: Batch, *, one_row: bool = False, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of every row, and the gradients of a loss in which each row has a weight of its
    own, so that chosen and rejected gradients cannot cancel or stand for one another.

    Args:
        one_row: whether the model is called with the batch's `documents`.
    """
    model.zero_grad(set_to_none=True)
    output = model(**(documents(batch) if one_row else batch.inputs), **kwargs)
    logits = rows_of_documents(output.logits, batch) if one_row else output.logits
    logps = completion_logps(logits, batch)
    weights = torch.linspace(1.0, -0.7, len(logps), dtype=logps.dtype, device=logps.device)
    loss = (logps * weights).sum()
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + output.aux_loss
    loss.backward()
    return logps.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_run(
    got: tuple[Tensor, dict[str, Tensor]],
    want: tuple[Tensor, dict[str, Tensor]],
    of_model: bool = False,
    tolerance: float = 2e-5,
) -> None:
    """Log-probs within the tolerance; each gradient within that part of its own largest entry, or
    `of_model`, of the model's: for batches where some gradients are zero in exact arithmetic."""
    torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
    assert got[1].keys() == want[1].keys()
    sizes = {name: gradient.abs().max().item() for name, gradient in want[1].items()}
    largest = max(sizes.values())
    assert largest > 0
    for name, gradient in want[1].items():
        scale = largest if of_model or sizes[name] == 0 else sizes[name]
        error = (got[1][name] - gradient).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error:.2e} of {scale:.2e}"


class LayerTokens:
    """Tokens that the first decoder layer saw, a shape a call; proof of which path ran."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
        layer.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.shapes.append(tuple(hidden.shape[:2]))
