from __future__ import annotations

import torch

from ..apply_rope import apply_rope
from ..rms_norm import rms_norm
from ..rope_table import rope_table
from ..rows import PagedRows, read_rows, write_rows


def compress(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    inv_freq: torch.Tensor,
    positions: torch.Tensor,
    request: torch.Tensor,
    states: PagedRows,
    state_slots: torch.Tensor,
    entries: PagedRows,
    *,
    ratio: int,
    eps: float,
    dtype: torch.dtype,
) -> None:
    rows = states.rows_per_page
    state = torch.cat((kv, gate + ape[positions % ratio]), dim=-1)
    write_rows(states, state_slots.div(rows, rounding_mode="floor"), state_slots % rows, state)

    completes = ((positions + 1) % ratio == 0) & (state_slots >= 0)
    last, owner = positions[completes], request[completes]
    if last.numel() == 0:
        return
    overlap = kv.shape[1] == 2 * entries.format.dim
    pooled = _pool(states, last, owner, ratio, overlap).to(dtype)
    cos_sin = rope_table(last - (ratio - 1), inv_freq)
    entry = apply_rope(rms_norm(pooled, norm_weight, eps), cos_sin)
    write_rows(entries, *entries.locate(owner, last // ratio), entry)


def _pool(states: PagedRows, last: torch.Tensor, owner: torch.Tensor, ratio: int, overlap: bool) -> torch.Tensor:
    """The gated sums [N, D] fp32 of the windows that end at positions `last` [N]."""
    span = 2 * ratio if overlap else ratio
    token = last[:, None] - torch.arange(span - 1, -1, -1, device=last.device)
    exists = token >= 0
    page, row = states.locate(owner[:, None], token.clamp(min=0))
    kv, gate = read_rows(states, page, row, exists).chunk(2, dim=-1)
    gate = gate.where(exists[..., None], -torch.inf)
    if overlap:
        dim = kv.shape[-1] // 2
        kv = torch.cat((kv[:, :ratio, :dim], kv[:, ratio:, dim:]), dim=1)
        gate = torch.cat((gate[:, :ratio, :dim], gate[:, ratio:, dim:]), dim=1)
    return (gate.softmax(dim=1) * kv).sum(dim=1)
