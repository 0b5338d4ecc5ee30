"""The lightning indexer: score the compressed entries of a CSA layer and keep the best (docs/model.md, "Indexer")."""

from __future__ import annotations

import torch

from .apply_rope import apply_rope
from .checks import check_cos_sin, check_shape
from .dispatch import op
from .rows import PagedRows, dequantise, quantise, read_rows

_WORKSPACE = 1 << 24  # fp32 values gathered or scored at once


def _check(
    q: torch.Tensor,
    cos_sin: torch.Tensor,
    weights: torch.Tensor,
    entries: PagedRows,
    positions: torch.Tensor,
    request: torch.Tensor,
    topk: int,
) -> None:
    num_tokens, heads, dim = q.shape
    check_shape("weights", weights, (num_tokens, heads))
    check_cos_sin(cos_sin, num_tokens, dim)
    check_shape("positions", positions, (num_tokens,))
    check_shape("request", request, (num_tokens,))
    if dim != entries.format.dim:
        raise ValueError(f"queries have {dim} dimensions, the cached keys {entries.format.dim}")
    if topk < 1:
        raise ValueError(f"topk must be positive, got {topk}")


@op(_check)
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
    width = min(topk, max_entries)
    selected = torch.empty((num_tokens, width), dtype=torch.int32, device=q.device)
    if width == 0:
        return selected
    q, weights = apply_rope(q, cos_sin), weights.float() * scale
    if entries.format.codec == "e2m1":
        q = dequantise(*quantise(q.flatten(0, 1), entries.format), entries.format).view_as(q)
    candidates = torch.arange(max_entries, device=q.device)
    chunk = max(1, _WORKSPACE // (max_entries * (dim + heads)))
    for start in range(0, num_tokens, chunk):
        part = slice(start, start + chunk)
        visible = candidates < ((positions[part] + 1) // ratio)[:, None]
        keys = read_rows(entries, *entries.locate(request[part, None], candidates.where(visible, 0)), visible)
        dots = torch.einsum("thd,tsd->ths", q[part].float(), keys).relu()
        scores = torch.einsum("ths,th->ts", dots, weights[part])
        # The stable sort puts visible entries without a number before the invisible ones, which come after them.
        scores = scores.masked_fill(~visible | scores.isnan(), -torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :width]
        chosen = best.where(visible.gather(1, best), max_entries).sort(dim=-1).values
        selected[part] = chosen.where(chosen < max_entries, -1).int()
    return selected
