"""Sparse attention in tiles of BLOCK_K keys, which are decoded once for both products.

A program takes up to 32 queries, the heads of one token or of several tokens that share their keys, and a share of
the visible keys. It multiplies K @ Q^T and K^T @ P^T: the width of a row lies on the long side of the matrix
instructions and the queries on the short one, which 8 heads fill. Where there are too few programs for the device,
each query's keys are split over several, and a second kernel merges what they found in a fixed order.

Tiles begin at multiples of BLOCK_K rows whatever the tokens, so that a token's sum does not depend on the tokens
beside it, as long as their number leads to the same splits.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ..rows import PagedRows
from .launch import block, device_of, launch
from .rope import load_rotary
from .rows import format_constants, locate, row_args
from .sparse_attention_rows import check_words, decode, fetch

_QUERIES = 32  # of one program, at most; fp32 ones, which no matrix unit multiplies, take more registers
_MOST_SPLITS = 64
_FIXED = 2  # tiles' worth of time that a part of them takes besides: queries in, sums out and merged; an estimate
_MERGED = 32  # pairs of a head's values that one program merges
_LOG2_E = math.log2(math.e)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    device, fmt = device_of(q), window.format
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    num_entries = 0 if entries is None else max_entries if indices is None else indices.shape[1]
    if entries is None or not num_entries:
        entries, indices, ratio = window, None, 0
    check_words(window)
    check_words(entries)
    dtype = torch.promote_types(q.dtype, fmt.dtype) if fmt.codec == "plain" else q.dtype
    queries, block_k = (_QUERIES, 32) if dtype.itemsize == 2 else (8, 16)
    # Tokens of one request share its keys, unless each token lists its own or decodes for another request.
    block_h = min(block(heads, 8), queries)
    alone = indices is not None or num_tokens <= window.block_table.shape[0]
    block_t = 1 if alone else queries // block_h
    token_blocks, head_blocks = triton.cdiv(num_tokens, block_t), triton.cdiv(heads, block_h)
    tiles = triton.cdiv(window_size, block_k) + 1 + triton.cdiv(num_entries, block_k)
    splits = _splits(token_blocks * head_blocks, tiles, device.multiprocessors)
    parts = stats = out
    if splits > 1:
        parts = torch.empty((num_tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((num_tokens, heads, splits, 2), dtype=torch.float32, device=q.device)
    # With few queries half the registers do, and two programs fit a multiprocessor; where they do not, ptxas should not
    # try, as it does when it is not told.
    halved = block_t * block_h == 8 and dtype.itemsize == 2 and not device.native_fp8
    rope = 0 if cos_sin is None else cos_sin.shape[1]
    cos_sin = q if cos_sin is None else cos_sin.contiguous()
    listed = q if indices is None else indices
    launch(
        # Programs that share keys start next to each other, so that one finds in the L2 what the other has read.
        _attend, (token_blocks * head_blocks, block_t * splits),
        q, q.stride(0), q.stride(1), sinks, positions, request, cos_sin, out, parts, stats,
        *row_args(window), *row_args(entries), listed, listed.stride(0),
        num_tokens, heads, window_size, num_entries, splits, scale * _LOG2_E,
        ROPE=rope, RATIO=ratio, LISTED=indices is not None, COLUMNS=1 if indices is None else block(num_entries),
        BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_K=block_k, SPLIT=splits > 1,
        WINDOW_ROWS=window.rows_per_page, ENTRY_ROWS=entries.rows_per_page,
        DTYPE=_TYPES[dtype], NATIVE=device.native_fp8, **format_constants(fmt) | {"BLOCK_D": block(dim, 64)},
        num_warps=8, num_stages=1, maxnreg=128 if halved else 255,
    )  # fmt: skip
    if splits > 1:
        launch(
            _merge, (num_tokens, heads, triton.cdiv(dim, 2 * _MERGED)),
            parts, stats, sinks, cos_sin, out, heads, splits,
            DIM=dim, ROPE=rope, PAIRS=_MERGED, BLOCK_S=block(splits), num_warps=4,
        )  # fmt: skip
    return out


@functools.cache
def _splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Into how many parts each program's tiles of keys are divided, so that the last round has little idle.

    A part costs its share of the tiles and as much as `_FIXED` of them besides.
    """
    most = max(1, min(tiles // 2, _MOST_SPLITS))
    return min(range(1, most + 1), key=lambda s: triton.cdiv(programs * s, multiprocessors) * (tiles / s + _FIXED))


@triton.jit(do_not_specialize=["num_tokens", "heads", "window_size", "num_entries", "splits"])
def _attend(
    q, q_stride, head_stride, sinks, positions, request, cos_sin, out, parts, stats,
    window, window_stride, window_table, window_table_stride, entries, entry_stride, entry_table, entry_table_stride,
    indices, index_stride, num_tokens, heads, window_size, num_entries, splits, log2_scale,
    ROPE: tl.constexpr, RATIO: tl.constexpr, LISTED: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, ENTRY_ROWS: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr,
    CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr, DATA: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    head_blocks = tl.cdiv(heads, BLOCK_H)
    t0, split = tl.program_id(0) // head_blocks * BLOCK_T, tl.program_id(1) // BLOCK_T
    start, first, final, owner = _run(positions, request, t0, num_tokens, tl.program_id(1) % BLOCK_T, BLOCK_T)
    if owner < 0:
        return
    r = tl.arange(0, ROWS)
    h0 = tl.program_id(0) % head_blocks * BLOCK_H
    t, h = t0 + r // BLOCK_H, h0 + r % BLOCK_H
    position = first + t - start
    live = (position >= first) & (position <= final) & (h < heads)
    visible_to_row = position
    if RATIO > 0:
        visible_to_row = (position + 1) // RATIO

    queries = q + t.to(tl.int64)[:, None] * q_stride + h.to(tl.int64)[:, None] * head_stride
    q_even, q_odd = _load_pairs(queries, live, DIM, BLOCK_D // 2, DTYPE)

    oldest = tl.maximum(first - window_size + 1, 0)
    lowest = oldest // BLOCK_K
    window_tiles = tl.where(final >= 0, final // BLOCK_K - lowest + 1, 0)
    tiles, visible = window_tiles, 0
    if RATIO > 0:
        visible = (final + 1) // RATIO
        if LISTED:
            # Where lists end in entries that do not count, as those of early tokens do, the end is left out.
            indices += t0.to(tl.int64) * index_stride
            column = tl.arange(0, COLUMNS)
            listed = tl.load(indices + column, mask=column < num_entries, other=-1)
            count = tl.max(tl.where((listed >= 0) & (listed < visible), column + 1, 0), axis=0)
        else:
            visible = tl.minimum(visible, num_entries)
            count = visible
        tiles += (count + BLOCK_K - 1) // BLOCK_K
    begin, end = tiles * split // splits, tiles * (split + 1) // splits

    m = tl.full((ROWS,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_K, ROWS), tl.float32)
    even, odd = tl.zeros((BLOCK_D // 2, ROWS), tl.float32), tl.zeros((BLOCK_D // 2, ROWS), tl.float32)
    number, valid, in_window = _numbers(
        begin, end, lowest, window_tiles, oldest, final, visible, indices, num_entries, BLOCK_K, LISTED
    )
    stored, scale, tail = _fetch(
        number, valid, in_window, owner, window, window_stride, window_table, window_table_stride,
        entries, entry_stride, entry_table, entry_table_stride,
        WINDOW_ROWS, ENTRY_ROWS, BLOCK_K, CODEC, DIM, QUANTISED, DATA, SCALES, BLOCK_D,
    )  # fmt: skip
    for i in range(begin, end):
        k_even, k_odd = decode(
            stored, scale, tail, BLOCK_K, CODEC, DIM, QUANTISED, BLOCK_D, NATIVE, window.dtype.element_ty, DTYPE
        )
        number, valid, in_window = _numbers(
            i + 1, end, lowest, window_tiles, oldest, final, visible, indices, num_entries, BLOCK_K, LISTED
        )
        stored, scale, tail = _fetch(
            number, valid, in_window, owner, window, window_stride, window_table, window_table_stride,
            entries, entry_stride, entry_table, entry_table_stride,
            WINDOW_ROWS, ENTRY_ROWS, BLOCK_K, CODEC, DIM, QUANTISED, DATA, SCALES, BLOCK_D,
        )  # fmt: skip
        scores = _scores(q_even, k_even, ROWS) + _scores(q_odd, k_odd, ROWS)
        number, valid, in_window = _numbers(
            i, end, lowest, window_tiles, oldest, final, visible, indices, num_entries, BLOCK_K, LISTED
        )
        seen = valid[:, None]
        if BLOCK_T > 1:
            seen &= number[:, None] <= tl.where(in_window, position, visible_to_row - 1)[None, :]
            seen &= number[:, None] > tl.where(in_window, position - window_size, -1)[None, :]
        scores = tl.where(seen, scores * log2_scale, -float("inf"))
        top = tl.maximum(m, tl.max(scores, axis=0))
        finite = tl.where(top > -float("inf"), top, 0.0)
        weights, kept = tl.exp2(scores - finite[None, :]), tl.exp2(m - finite)[None, :]
        m, l = top, l * kept + weights
        weights = weights.to(DTYPE)
        even = tl.dot(tl.trans(k_even), weights, even * kept, input_precision="ieee")
        odd = tl.dot(tl.trans(k_odd), weights, odd * kept, input_precision="ieee")
    l = tl.sum(l, axis=0)

    # Zero, but not to the compiler, which would otherwise keep what it computed from `r` in registers that the loop
    # needs; for the same reason what lies within a program's rows is addressed by 32 bits.
    zero = tl.minimum(num_tokens, 0)
    r += zero
    t, h = t0 + r // BLOCK_H, h0 + r % BLOCK_H
    live = (t >= start) & (t <= start + final - first) & (h < heads)
    at0, at = t0.to(tl.int64) * heads + h0, r // BLOCK_H * heads + r % BLOCK_H
    if SPLIT:
        at = at * splits + split
        stats += at0 * splits * 2
        tl.store(stats + at * 2, m, mask=live)
        tl.store(stats + at * 2 + 1, l, mask=live)
        parts += at0 * splits * DIM
        live &= h < tl.where(begin < end, heads, 0)
        # A row of parts has all its even values first.
        j = zero + tl.arange(0, BLOCK_D // 2)[:, None]
        mask = live[None, :] & (2 * j < DIM)
        tl.store(parts + (at[None, :] * DIM + j), even, mask=mask)
        tl.store(parts + (at[None, :] * DIM + DIM // 2 + j), odd, mask=mask)
    else:
        share = _share(m, l, tl.load(sinks + h, mask=live, other=0.0))[None, :]
        even, odd = even * share, odd * share
        if ROPE > 0:
            # Angles are loaded once per token, not per head.
            d, b = 2 * tl.arange(0, BLOCK_D // 2)[:, None], t0 + tl.arange(0, BLOCK_T)[None, :]
            cos, sin = load_rotary(cos_sin, tl.minimum(b, num_tokens - 1), d, DIM, ROPE, True)
            cos = tl.broadcast_to(cos[:, :, None], (BLOCK_D // 2, BLOCK_T, BLOCK_H)).reshape(BLOCK_D // 2, ROWS)
            sin = tl.broadcast_to(sin[:, :, None], (BLOCK_D // 2, BLOCK_T, BLOCK_H)).reshape(BLOCK_D // 2, ROWS)
            even, odd = even * cos + odd * sin, odd * cos - even * sin
        dtype = out.dtype.element_ty
        x = tl.join(tl.trans(even.to(dtype)), tl.trans(odd.to(dtype))).reshape(ROWS, BLOCK_D)
        d = tl.arange(0, BLOCK_D)[None, :]
        tl.store(out + at0 * DIM + (at[:, None] * DIM + d), x, mask=live[:, None] & (d < DIM))


@triton.jit
def _load_pairs(queries, live, DIM: tl.constexpr, PAIRS: tl.constexpr, DTYPE: tl.constexpr):
    """The even and the odd values of the queries at these addresses, [ROWS, PAIRS] each."""
    d = 2 * tl.arange(0, PAIRS)[None, :]
    even = tl.load(queries + d, mask=live[:, None] & (d < DIM), other=0.0).to(DTYPE)
    return even, tl.load(queries + d + 1, mask=live[:, None] & (d + 1 < DIM), other=0.0).to(DTYPE)


@triton.jit
def _run(positions, request, t0, num_tokens, n, BLOCK_T: tl.constexpr):
    """Of a block's n-th run of consecutive tokens of one request: first token, first and last position, request.

    The request is -1 if there are not so many runs.
    """
    if BLOCK_T == 1:
        start, first, owner = t0, tl.load(positions + t0).to(tl.int32), tl.load(request + t0).to(tl.int32)
        final = first
    else:
        b = t0 + tl.arange(0, BLOCK_T)
        inside, follows = b < num_tokens, (b < num_tokens) & (b > t0)
        position = tl.load(positions + b, mask=inside, other=0).to(tl.int32)
        whose = tl.load(request + b, mask=inside, other=-1).to(tl.int32)
        before = tl.load(positions + b - 1, mask=follows, other=0).to(tl.int32)
        whose_before = tl.load(request + b - 1, mask=follows, other=-1).to(tl.int32)
        breaks = follows & ((position != before + 1) | (whose != whose_before))
        mine = inside & (tl.cumsum(breaks.to(tl.int32), axis=0) == n)
        start = tl.min(tl.where(mine, b, 2147483647), axis=0)
        first = tl.min(tl.where(mine, position, 2147483647), axis=0)
        final = tl.max(tl.where(mine, position, -1), axis=0)
        owner = tl.max(tl.where(mine, whose, -1), axis=0)
    return start, first, final, owner


@triton.jit
def _numbers(
    i, end, lowest, window_tiles, oldest, final, visible, indices, num_entries,
    BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The row numbers of tile i < end [BLOCK_K], which of them any token of the run may see, and if it is the window's.

    Tiles of the window come first.
    """
    in_window = i < window_tiles
    number = tl.where(in_window, lowest + i, i - window_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    if LISTED:
        listed = tl.load(
            indices + number, mask=number < tl.where((i >= window_tiles) & (i < end), num_entries, 0), other=-1
        )
        number = tl.where(in_window, number, listed)
    newest = tl.where(i < end, tl.where(in_window, final, visible - 1), -1)
    return number, (number >= tl.where(in_window, oldest, 0)) & (number <= newest), in_window


@triton.jit
def _fetch(
    number, valid, in_window, request, window, window_stride, window_table, window_table_stride,
    entries, entry_stride, entry_table, entry_table_stride,
    WINDOW_ROWS: tl.constexpr, ENTRY_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr, DATA: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # A branch, because the compiler loses the alignment of addresses that a `where` chooses.
    if in_window:
        page, row = locate(window_table, window_table_stride, request, number, valid, WINDOW_ROWS)
        data = window + page * window_stride + row * DATA
        scales = data + (WINDOW_ROWS * DATA + row * (SCALES - DATA))
    else:
        page, row = locate(entry_table, entry_table_stride, request, number, valid, ENTRY_ROWS)
        data = entries + page * entry_stride + row * DATA
        scales = data + (ENTRY_ROWS * DATA + row * (SCALES - DATA))
    return fetch(data, scales, valid, CODEC, DIM, QUANTISED, SCALES, BLOCK_D)


@triton.jit
def _scores(query, k, ROWS: tl.constexpr):
    """Products of every key [BLOCK_K, D] with every query [ROWS, D], as [BLOCK_K, ROWS]."""
    if ROWS < 16:
        scores = tl.dot(k, tl.trans(query), input_precision="ieee")
    else:
        # Transposed afterwards, or the compiler gives every warp all the keys.
        scores = tl.trans(tl.dot(query, tl.trans(k), input_precision="ieee"))
    return scores


@triton.jit
def _share(m, l, sink):
    """What a sum of values weighted by 2^(score - m) is multiplied by; l is the sum of the weights, 0 without a key."""
    total = l + tl.exp2(sink * 1.4426950408889634 - tl.where(m > -float("inf"), m, 0.0))
    return tl.where(l > 0, 1.0 / total, 0.0)


@triton.jit(do_not_specialize=["heads", "splits"])
def _merge(
    parts, stats, sinks, cos_sin, out, heads, splits,
    DIM: tl.constexpr, ROPE: tl.constexpr, PAIRS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, j = tl.arange(0, BLOCK_S), tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    at = t * heads + h
    m = tl.load(stats + (at * splits + s) * 2, mask=s < splits, other=-float("inf"))
    l = tl.load(stats + (at * splits + s) * 2 + 1, mask=s < splits, other=0.0)
    top = tl.max(m, axis=0)
    weights = tl.exp2(m - tl.where(top > -float("inf"), top, 0.0))
    share = _share(top, tl.sum(l * weights, axis=0), tl.load(sinks + h))
    part, mask = parts + (at * splits + s)[:, None] * DIM + j[None, :], (m > -float("inf"))[:, None] & (2 * j < DIM)
    even = tl.sum(tl.load(part, mask=mask, other=0.0) * weights[:, None], axis=0) * share
    odd = tl.sum(tl.load(part + DIM // 2, mask=mask, other=0.0) * weights[:, None], axis=0) * share
    if ROPE > 0:
        cos, sin = load_rotary(cos_sin, t, 2 * j, DIM, ROPE, True)
        even, odd = even * cos + odd * sin, odd * cos - even * sin
    d = tl.program_id(2) * PAIRS * 2 + tl.arange(0, PAIRS * 2)
    x = tl.join(even, odd).reshape(PAIRS * 2).to(out.dtype.element_ty)
    tl.store(out + at * DIM + d, x, mask=d < DIM)
