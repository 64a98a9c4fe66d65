"""Shared attention by duplicating rows: the specification, slow and plain.

Tests hold every backend to this, and so does the check of a kernel at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_prefix_patch.tree import PrefixTree


def duplicated_rows_attention(
    tree: PrefixTree,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Copy every shared prefix back into its rows and run dense causal attention on those.

    Args:
        tree: the plan of the batch.
        query: `[1, heads, N, head_dim]`; `key` and `value` `[1, kv_heads, N, head_dim]`.
        sliding_window: number of keys seen, the query's own included.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: `[heads]` attention sinks: one more score of each query, whose weight goes nowhere.

    Returns:
        `[1, N, heads, head_dim]`, each packed token read from the first row that holds it.
    """
    q, k, v = (tree.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    column = torch.arange(tree.row_length, device=query.device)
    visible = column[:, None] >= column
    if sliding_window is not None:
        visible &= column[:, None] - column < sliding_window
    real = torch.zeros(tree.padded_tokens, dtype=torch.bool, device=query.device)
    real[tree.cell] = True
    real = real.view(tree.num_rows, 1, 1, tree.row_length)
    scores = scores.masked_fill(~(visible & real), -torch.inf)
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : tree.row_length]
    # A padded query sees no key; its softmax is 0/0 and must not reach the packed row.
    weights = weights.masked_fill(~real.transpose(2, 3), 0.0)
    return tree.pack((weights @ v).transpose(1, 2))
