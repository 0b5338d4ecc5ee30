"""Attention over the sliding window and compressed entries, in one softmax with a sink (docs/model.md, "Attention")."""

from __future__ import annotations

import torch

from .checks import check_cos_sin, check_dtype, check_shape
from .dispatch import implementation
from .rows import PagedRows


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
    """Attend from the token at position t to window rows max(0, t - window_size + 1)..t and to compressed entries.

    Entries are keys and values at once, as window rows are. A token sees entry s if s < (t + 1) // ratio and, when
    `indices` is given, s is among its indices; others (-1, beyond the visible ones) are ignored, one listed twice
    counts twice. All scores, `q . k * scale`, share one fp32 softmax with the unscaled `sinks[h]`, which takes weight
    but has no value. A token with nothing to attend to gets zeros.

    Args:
        q: [T, H, D], rotated.
        sinks: [H] fp32; -inf is no sink.
        positions: [T] int64. request: [T] integer row of the block tables.
        window: rows numbered by position.
        entries: rows numbered by window of `ratio` tokens, or None for a layer without compression.
        indices: [T, K] int32 (CSA), or None to attend to every visible entry (HCA).
        max_entries: no token sees more entries than this (a host number).
        cos_sin: [T, R] fp32 at the tokens' positions, to rotate the result back; None leaves it as it is.
        out: [T, H, D] contiguous, the dtype of `q`, where the result is to lie; None makes a new tensor.

    Returns:
        [T, H, D], the dtype of `q`; rounded to it once, after the rotation.
    """
    num_tokens, heads, dim = q.shape
    check_shape("sinks", sinks, (heads,))
    check_dtype("sinks", sinks, torch.float32)
    if indices is not None:
        check_shape("indices", indices, (num_tokens, None))
        check_dtype("indices", indices, torch.int32)
    if cos_sin is not None:
        check_cos_sin(cos_sin, num_tokens, dim)
    for name, cache in (("window", window), ("entries", entries)):
        if cache is not None and cache.format.dim != dim:
            raise ValueError(f"{name} rows have {cache.format.dim} values, the queries {dim}")
    if entries is not None and entries.format != window.format:
        raise ValueError(f"window rows and entries must be stored alike, got {window.format} and {entries.format}")
    if out is not None:
        check_shape("out", out, (num_tokens, heads, dim))
        check_dtype("out", out, q.dtype)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, its strides are {out.stride()}")
    if entries is not None and ratio < 1:
        raise ValueError(f"compressed entries need their ratio, got {ratio}")
    return implementation("sparse_attention", q.device)(
        q, sinks, positions, request, window, window_size=window_size, scale=scale,
        entries=entries, indices=indices, ratio=ratio, max_entries=max_entries, cos_sin=cos_sin, out=out,
    )  # fmt: skip
