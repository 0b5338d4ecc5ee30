"""The lightning indexer: score the compressed entries of a CSA layer and keep the best (spec section 3.7)."""

from __future__ import annotations

import torch

from .checks import check_dtype, check_shape
from .dispatch import implementation
from .rows import PagedRows


def indexer_topk(
    q: torch.Tensor,
    weights: torch.Tensor,
    entries: PagedRows,
    positions: torch.Tensor,
    request: torch.Tensor,
    *,
    ratio: int,
    topk: int,
    max_entries: int,
) -> torch.Tensor:
    """The `topk` visible entries s with the largest `sum_h relu(q_h . k_s) * weights_h`, by value descending.

    Entry s is visible to the token at position t if s < (t + 1) // ratio. Equal scores go to the smaller s, so a run
    repeats exactly. With 4-bit entries the queries are transformed and rounded the way the keys were.

    Args:
        q: [T, H, D], rotated. weights: [T, H] fp32, already scaled.
        entries: the indexer's key cache, rows of D.
        positions: [T] int64. request: [T] integer row of the block table.
        max_entries: no token sees more entries than this (a host number, so that nothing waits for the device).

    Returns:
        [T, min(topk, max_entries)] int32, -1 where a token sees fewer.
    """
    num_tokens, heads, dim = q.shape
    check_shape("weights", weights, (num_tokens, heads))
    check_dtype("weights", weights, torch.float32)
    if dim != entries.format.dim:
        raise ValueError(f"queries have {dim} dimensions, the cached keys {entries.format.dim}")
    if topk < 1:
        raise ValueError(f"topk must be positive, got {topk}")
    return implementation("indexer_topk", q.device)(
        q, weights, entries, positions, request, ratio=ratio, topk=topk, max_entries=max_entries
    )
