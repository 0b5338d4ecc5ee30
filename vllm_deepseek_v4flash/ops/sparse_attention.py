"""Attention over the sliding window and compressed entries, in one softmax with a sink (docs/model.md, "Attention")."""

from __future__ import annotations

import torch

from .apply_rope import apply_rope
from .checks import check_cos_sin, check_dtype, check_shape
from .dispatch import op
from .rows import PagedRows, read_rows

_WORKSPACE = 1 << 24  # fp32 values gathered at once


def _check(
    q: torch.Tensor,
    sinks: torch.Tensor,
    window: PagedRows,
    entries: PagedRows | None,
    indices: torch.Tensor | None,
    ratio: int,
    cos_sin: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    num_tokens, heads, dim = q.shape
    check_shape("sinks", sinks, (heads,))
    check_dtype(torch.float32, sinks=sinks)
    if indices is not None:
        check_shape("indices", indices, (num_tokens, None))
        check_dtype(torch.int32, indices=indices)
    if cos_sin is not None:
        check_cos_sin(cos_sin, num_tokens, dim)
    for name, cache in (("window", window), ("entries", entries)):
        if cache is not None and cache.format.dim != dim:
            raise ValueError(f"{name} rows have {cache.format.dim} values, the queries {dim}")
    if entries is not None and entries.format != window.format:
        raise ValueError(f"window rows and entries must have the same format, got {window.format} and {entries.format}")
    if out is not None:
        check_shape("out", out, (num_tokens, heads, dim))
        check_dtype(q.dtype, out=out)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, its strides are {out.stride()}")
    if entries is not None and ratio < 1:
        raise ValueError(f"compressed entries need their ratio, got {ratio}")


@op(_check)
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

    Entries are keys and values at once, like window rows. A token sees entry s if s < (t + 1) // ratio and, when
    `indices` is given, s is among its indices; others (-1, beyond the visible ones) are ignored, one listed twice
    counts twice. All scores, `q . k * scale`, share one fp32 softmax with the unscaled `sinks[h]`, which takes weight
    but has no value. A token with nothing to attend to gets zeros. A NaN in its query or in a key that it sees makes
    its result NaN; an infinity makes some of it NaN or infinite.

    Args:
        q: [T, H, D], rotated.
        sinks: [H] fp32; -inf is no sink.
        positions: [T] int64. request: [T] integer row of the block tables.
        window: rows numbered by position.
        entries: rows numbered by window of `ratio` tokens, or None for a layer without compression.
        indices: [T, K] int32 (CSA), or None to attend to every visible entry (HCA).
        max_entries: no token sees more entries than this (a host number).
        cos_sin: [T, R] fp32 at the tokens' positions, to rotate the result back; None leaves it as it is.
        out: [T, H, D] contiguous, the dtype of `q`, which receives the result; None makes a new tensor.

    Returns:
        [T, H, D], the dtype of `q`; rounded to it once, after the rotation.
    """
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
    share = weights.sum(-1)
    total = share + (sinks - top).exp()
    # Without any key the sum is zero already, and without a sink so is the total. NaN must stay NaN.
    total = total.where(share != 0, 1.0)
    return torch.einsum("thk,tkd->thd", weights, keys) / total[..., None]
