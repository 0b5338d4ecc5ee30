"""The compressor: pool finished windows of tokens into cached entries (docs/model.md, "Compressor")."""

from __future__ import annotations

import torch

from .apply_rope import apply_rope
from .checks import check_dtype, check_shape
from .dispatch import op
from .rms_norm import rms_norm
from .rope_table import rope_table
from .rows import PagedRows, read_rows, write_rows


def _check(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    states: PagedRows,
    state_slots: torch.Tensor,
    entries: PagedRows,
    ratio: int,
) -> None:
    num_tokens, channels = kv.shape
    dim = entries.format.dim
    if channels not in (dim, 2 * dim):
        raise ValueError(f"kv must be {dim} or, with overlap, {2 * dim} wide, got {channels}")
    check_shape("gate", gate, (num_tokens, channels))
    check_shape("ape", ape, (ratio, channels))
    check_shape("norm_weight", norm_weight, (dim,))
    check_shape("state_slots", state_slots, (num_tokens,))
    check_dtype(torch.float32, kv=kv, gate=gate, ape=ape, states=states.pages)
    if states.format.dim != 2 * channels:
        raise ValueError(f"state rows must hold kv and gate, {2 * channels} values, got {states.format.dim}")


@op(_check)
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
    """Store every token's state row and, where a token completes a window of `ratio`, that window's entry.

    Entry w is `sum_j softmax_j(gate_j + ape_j) * kv_j` per channel over the tokens of window w; then rounded to
    `dtype`, normalised, rotated at position w * ratio, and written to `entries` in their format. When C = 2D the
    windows overlap: the entry pools 2 * ratio rows, the previous window's through their first D channels and its own
    through their last D; window 0 has no previous one. A window may have begun in an earlier step, whose states come
    from the cache; its entry is the same however the steps divide it.

    Args:
        kv, gate: [T, C] fp32, the compressor's projections; C is D, or 2D with overlap.
        ape: [ratio, C] fp32, indexed by position mod ratio.
        norm_weight: [D]. inv_freq: [R/2] fp32.
        positions: [T] int64. request: [T] integer row of the block tables. A request's tokens are next to each other,
            at consecutive positions.
        states: plain fp32 rows of 2C, kv then gate + ape, numbered by position.
        state_slots: [T] int64, page * rows_per_page + row; a negative one is a padded token: nothing is written.
        entries: rows of D, numbered by window.
        dtype: the model's dtype, in which the pooled entry is rounded, normalised and rotated.
    """
    rows = states.rows_per_page
    state = torch.cat((kv, gate + ape[positions % ratio]), dim=-1)
    write_rows(states, state_slots.div(rows, rounding_mode="floor"), state_slots % rows, state)

    completes = ((positions + 1) % ratio == 0) & (state_slots >= 0)
    last, owner = positions[completes], request[completes]
    if last.numel() == 0:
        return
    overlap = kv.shape[1] == 2 * entries.format.dim
    pooled = _pool(states, last, owner, ratio, overlap).to(dtype)
    cos_sin = rope_table.reference(last - (ratio - 1), inv_freq)
    entry = apply_rope(rms_norm.reference(pooled, norm_weight, eps), cos_sin)
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
