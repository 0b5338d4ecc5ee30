from __future__ import annotations

import torch

from ..apply_rope import apply_rope
from ..rows import PagedRows, dequantise, quantise, read_rows

_WORKSPACE = 1 << 24  # fp32 values gathered or scored at once


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
