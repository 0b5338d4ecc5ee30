from __future__ import annotations

import torch

from ..apply_rope import apply_rope
from ..rows import PagedRows, read_rows

_WORKSPACE = 1 << 24  # fp32 values gathered at once


def sparse_attention(
    q: torch.Tensor,
    sinks: torch.Tensor,
    positions: torch.Tensor,
    request: torch.Tensor,
    window: PagedRows,
    *,
    window_size: int,
    scale: float,
    entries: PagedRows | None = None,
    indices: torch.Tensor | None = None,
    ratio: int = 0,
    max_entries: int = 0,
    cos_sin: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(q) if out is None else out
    if entries is None:
        num_entries = 0
    else:
        num_entries = max_entries if indices is None else indices.shape[1]
    chunk = max(1, _WORKSPACE // ((window_size + num_entries) * q.shape[2]))
    for start in range(0, q.shape[0], chunk):
        part = slice(start, start + chunk)
        keys, valid = _window_rows(window, positions[part], request[part], window_size)
        if entries is not None and num_entries:
            listed = torch.arange(num_entries, device=q.device)[None] if indices is None else indices[part].long()
            more, seen = _entry_rows(entries, listed, positions[part], request[part], ratio)
            keys, valid = torch.cat((keys, more), dim=1), torch.cat((valid, seen), dim=1)
        attended = _attend(q[part].float(), keys, valid, sinks, scale)
        if cos_sin is not None:
            attended = apply_rope(attended, cos_sin[part], inverse=True)
        out[part] = attended.to(q.dtype)
    return out


def _window_rows(
    window: PagedRows, positions: torch.Tensor, request: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    token = positions[:, None] - torch.arange(size - 1, -1, -1, device=positions.device)
    valid = token >= 0
    return read_rows(window, *window.locate(request[:, None], token.where(valid, 0)), valid), valid


def _entry_rows(
    entries: PagedRows, listed: torch.Tensor, positions: torch.Tensor, request: torch.Tensor, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    valid = (listed >= 0) & (listed < ((positions + 1) // ratio)[:, None])
    return read_rows(entries, *entries.locate(request[:, None], listed.where(valid, 0)), valid), valid


def _attend(
    q: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor, sinks: torch.Tensor, scale: float
) -> torch.Tensor:
    """[C, H, D] queries over [C, K, D] keys that are also the values; fp32 throughout."""
    scores = torch.einsum("thd,tkd->thk", q, keys) * scale
    scores = scores.masked_fill(~valid[:, None], -torch.inf)
    # Without any valid key the maximum is -inf, and -inf - -inf would be NaN.
    top = scores.amax(-1)
    top = top.where(top > -torch.inf, 0.0)
    weights = (scores - top[..., None]).exp()
    total = weights.sum(-1) + (sinks - top).exp()
    out = torch.einsum("thk,tkd->thd", weights, keys)
    return torch.where(total[..., None] > 0, out / total[..., None], 0.0)
