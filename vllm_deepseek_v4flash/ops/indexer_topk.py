"""The lightning indexer: score the compressed entries of a CSA layer and keep the best (docs/model.md, "Indexer")."""

from __future__ import annotations

import torch

from .checks import check_cos_sin, check_shape
from .dispatch import implementation
from .rows import PagedRows


def indexer_topk(
    q: torch.Tensor,
    cos_sin: torch.Tensor,
    weights: torch.Tensor,
    entries: PagedRows,
    positions: torch.Tensor,
    request: torch.Tensor,
    *,
    ratio: int,
    topk: int,
    max_entries: int,
    scale: float,
) -> torch.Tensor:
    """The `topk` visible entries s with the largest `sum_h relu(rope(q_h) . k_s) * weights_h * scale`.

    Entry s is visible to the token at position t if s < (t + 1) // ratio. Entries rank by score descending, then by
    index ascending, so that a run repeats bit for bit; the chosen ones are listed by index, which reads the cache in
    order. With 4-bit entries the rotated queries are transformed and rounded the way the keys were. A score that is
    not a number ranks as -inf.

    Args:
        q: [T, H, D] from wq_b; rotated here and rounded to its dtype. cos_sin: [T, R] fp32 at the tokens' positions.
        weights: [T, H], floating, from weights_proj.
        entries: the indexer's key cache, rows of D.
        positions: [T] int64. request: [T] integer row of the block table.
        max_entries: no token sees more entries than this (a host number, so that nothing waits for the device).
        scale: a positive factor of all scores, (D H)^-0.5.

    Returns:
        [T, min(topk, max_entries)] int32, ascending, then -1 where a token sees fewer.
    """
    num_tokens, heads, dim = q.shape
    check_shape("weights", weights, (num_tokens, heads))
    check_cos_sin(cos_sin, num_tokens, dim)
    check_shape("positions", positions, (num_tokens,))
    check_shape("request", request, (num_tokens,))
    if dim != entries.format.dim:
        raise ValueError(f"queries have {dim} dimensions, the cached keys {entries.format.dim}")
    if topk < 1:
        raise ValueError(f"topk must be positive, got {topk}")
    return implementation("indexer_topk", q.device)(
        q, cos_sin, weights, entries, positions, request, ratio=ratio, topk=topk, max_entries=max_entries, scale=scale
    )  # fmt: skip
