from __future__ import annotations

import math

import torch

from ..rows import PagedRows
from . import threads
from .arithmetic import INFINITY, ONE, ZERO, exp, rotate, total
from .compiling import Cache, helper, kernel
from .memory import code, fill, get, get_i32, get_i64, integer, load, packed, put, size_of, store
from .paged import NO_CACHE, cache, fetch_row, page_of, read_row, read_rows
from .products import add_weighted, dots_fp32

_BLOCK = 64  # rows read, scored and added together
_AHEAD = 8  # rows prefetched


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
    num_tokens, heads, dim = q.shape
    q, sinks, positions, request, indices, cos_sin = packed(q, sinks, positions, request, indices, cos_sin)
    out = torch.empty_like(q) if out is None else out
    num_entries = 0 if entries is None else max_entries if indices is None else indices.shape[1]
    padded = -(-heads // 4) * 4
    threads.run(
        _attend, num_tokens, 2.0 * q.numel() * (window_size + num_entries),
        (2 * padded + _BLOCK) * dim + padded * _BLOCK + 2 * padded,
        q.data_ptr(), out.data_ptr(), code(q), heads, dim, sinks.data_ptr(), positions.data_ptr(),
        request.data_ptr(), request.element_size() == 8, cache(window), window_size, scale,
        NO_CACHE if entries is None else cache(entries), num_entries, ratio,
        0 if indices is None else indices.data_ptr(),
        0 if cos_sin is None else cos_sin.data_ptr(), 0 if cos_sin is None else cos_sin.shape[1],
    )  # fmt: skip
    return out


@helper
def _add_rows(queries, heads, dim, keys, count, scale, weights, sums, tops, totals):
    """Add `count` rows to the running softmax of every head."""
    dots_fp32(queries, heads, keys, count, dim, weights, _BLOCK)
    for h in range(heads):
        row = weights + 4 * h * _BLOCK
        old = top = get(tops, h)
        for i in range(count):
            score = get(row, i) * scale
            put(row, i, score)
            top = score if score > top else top
        shift = top if top > -INFINITY else ZERO
        for i in range(count):
            put(row, i, exp(get(row, i) - shift))
        kept = exp(old - shift)
        put(totals, h, get(totals, h) * kept + total(row, count))
        put(tops, h, top)
        sum_row = sums + 4 * h * dim
        if kept != ONE:
            for d in range(dim):
                put(sum_row, d, get(sum_row, d) * kept)
    add_weighted(weights, _BLOCK, heads, keys, count, dim, sums)


@kernel
def _attend(
    begin: int, end: int, room: int,
    q: int, out: int, dtype: int, heads: int, dim: int, sinks: int, positions: int,
    request: int, wide: bool, window: Cache, window_size: int, scale: float,
    entries: Cache, num_entries: int, ratio: int, indices: int,
    cos_sin: int, rotary: int,
) -> None:  # fmt: skip
    padded = (heads + 3) // 4 * 4
    queries, keys = room, room + 4 * padded * dim
    sums = keys + 4 * _BLOCK * dim
    weights = sums + 4 * padded * dim
    tops = weights + 4 * padded * _BLOCK
    totals = tops + 4 * padded
    fill(queries, padded * dim, ZERO)
    for t in range(begin, end):
        at = t * heads * dim * size_of(dtype)
        load(q + at, dtype, heads * dim, queries)
        fill(sums, padded * dim, ZERO)
        fill(tops, padded, -INFINITY)
        fill(totals, padded, ZERO)
        position, owner = get_i64(positions, t), integer(request, wide, t)
        oldest = max(0, position - window_size + 1)
        in_window = max(0, position + 1 - oldest)
        visible = (position + 1) // ratio if num_entries else 0
        filled = i = 0
        last = in_window + (num_entries if indices else min(visible, num_entries))
        while i < last:
            more = 1
            if i < in_window:
                more = min(_BLOCK - filled, in_window - i)
                read_rows(window, owner, oldest + i, more, keys + 4 * filled * dim)
                filled += more
            elif not indices:
                more = min(_BLOCK - filled, last - i)
                read_rows(entries, owner, i - in_window, more, keys + 4 * filled * dim)
                filled += more
            else:
                ahead = get_i32(indices, t * num_entries + min(i + _AHEAD, last - 1) - in_window)
                if 0 <= ahead < visible:
                    fetch_row(entries, owner, ahead)
                row = get_i32(indices, t * num_entries + i - in_window)
                if 0 <= row < visible:
                    page, offset = page_of(entries, owner, row)
                    read_row(entries, page, offset, keys + 4 * filled * dim)
                    filled += 1
            i += more
            if filled == _BLOCK or (filled and i == last):
                _add_rows(queries, padded, dim, keys, filled, scale, weights, sums, tops, totals)
                filled = 0
        for h in range(heads):
            shift = get(tops, h) if get(tops, h) > -INFINITY else ZERO
            whole = get(totals, h) + math.exp(get(sinks, h) - shift)
            # Without any key the sums are zeros already; NaN must stay NaN.
            whole = ONE if get(totals, h) == ZERO else whole
            row = sums + 4 * h * dim
            for d in range(dim):
                put(row, d, get(row, d) / whole)
            if rotary:
                rotate(row + 4 * (dim - rotary), cos_sin + 4 * t * rotary, rotary // 2, -ONE)
        store(out + at, dtype, heads * dim, sums)
