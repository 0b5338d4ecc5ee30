"""The compressor: pool finished windows of tokens into cached entries (docs/model.md, "Compressor")."""

from __future__ import annotations

import torch

from .checks import check_dtype, check_shape
from .dispatch import implementation
from .rows import PagedRows


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
    `dtype`, normalised, rotated at position w * ratio, and written to `entries` as its format says. When C = 2D the
    windows overlap: the entry pools 2 * ratio rows, the previous window's through their first D channels and its own
    through their last D; window 0 has no previous one. A window may have begun in an earlier step, whose states come
    from the cache; its entry is the same however the steps divide it.

    Args:
        kv, gate: [T, C] fp32, the compressor's projections; C is D, or 2D with overlap.
        ape: [ratio, C] fp32, indexed by position mod ratio.
        norm_weight: [D]. inv_freq: [R/2] fp32.
        positions: [T] int64. request: [T] integer row of the block tables. A request's tokens lie next to each other,
            at consecutive positions.
        states: plain fp32 rows of 2C, kv then gate + ape, numbered by position.
        state_slots: [T] int64, page * rows_per_page + row; a negative one is a padded token: nothing is written.
        entries: rows of D, numbered by window.
        dtype: the model's dtype, in which the pooled entry is rounded, normalised and rotated.
    """
    num_tokens, channels = kv.shape
    dim = entries.format.dim
    if channels not in (dim, 2 * dim):
        raise ValueError(f"kv must be {dim} or, with overlap, {2 * dim} wide, got {channels}")
    check_shape("gate", gate, (num_tokens, channels))
    check_shape("ape", ape, (ratio, channels))
    check_shape("norm_weight", norm_weight, (dim,))
    check_shape("state_slots", state_slots, (num_tokens,))
    for name, tensor in (("kv", kv), ("gate", gate), ("ape", ape)):
        check_dtype(name, tensor, torch.float32)
    if states.format.dim != 2 * channels:
        raise ValueError(f"state rows must hold kv and gate, {2 * channels} values, got {states.format.dim}")
    check_dtype("states", states.pages, torch.float32)
    implementation("compress", kv.device)(
        kv, gate, ape, norm_weight, inv_freq, positions, request, states, state_slots, entries,
        ratio=ratio, eps=eps, dtype=dtype,
    )  # fmt: skip
