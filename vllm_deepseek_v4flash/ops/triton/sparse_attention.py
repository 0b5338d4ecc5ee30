"""Sparse attention in tiles of BLOCK_K keys, which are decoded once for both products.

A program takes up to 32 queries, the heads of one token or of several tokens that share their keys, and a share of
the visible keys. It multiplies K @ Q^T and K^T @ P^T: the width of a row is on the long side of the matrix instructions
and the queries on the short one, which 8 heads fill. Where there are too few programs for the device, each query's keys
are split over several, and a second kernel merges what they found in a fixed order.

Tiles begin at multiples of BLOCK_K rows for all tokens, so that a token's sum does not depend on the other tokens, as
long as their number leads to the same splits.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..rows import PagedRows
from .launch import Pointer, Strided, block, device_of, launch
from .rope import load_rotary
from .rows import Rows, layout_of, locate, rows_of
from .sparse_attention_keys import numbers, reach_of, run_of
from .sparse_attention_rows import check_words, decode, fetch

_QUERIES = 32  # of one program, at most; fp32 ones, which no matrix unit multiplies, take more registers
_MOST_SPLITS = 64
_FIXED = 2  # what a part costs in addition, in tiles: queries in, sums out and merged; an estimate
_MERGED = 32  # pairs of a head's values that one program merges
_LOG2_E = math.log2(math.e)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Queries(NamedTuple):
    """Queries [T, H, D], and what their tokens and heads have; strides in elements."""

    data: Pointer
    token_stride: int
    head_stride: int
    sinks: Pointer
    """[H] fp32"""
    positions: Pointer
    request: Pointer
    cos_sin: Pointer
    """[T, ROPE] fp32, if the result is rotated back"""
    log2_scale: float
    """Scores are multiplied by it, and are then exponents of 2."""


class Result(NamedTuple):
    """Where a program writes: `out`, or `parts` and `stats` if keys are split."""

    out: Pointer
    """[T, H, D]"""
    parts: Pointer
    """[T, H, splits, D] fp32, unnormalised; the even values of a row come first."""
    stats: Pointer
    """[T, H, splits, 2] fp32: the highest score and the sum of the weights relative to it"""


class Plan(NamedTuple):
    """What the kernel is compiled for, in addition to the rows' layout."""

    rope: int
    """Dimensions of the result that are rotated back."""
    ratio: int
    """Tokens of an entry; 0 without entries."""
    listed: bool
    """Whether each token lists its entries."""
    columns: int
    """The power of two that holds a list."""
    block_t: int
    block_h: int
    block_k: int
    split: bool
    entry_rows: int
    """Entries of a page."""
    dtype: Any
    """What is multiplied."""


class Sums(NamedTuple):
    """What a program knows of its queries, inside a kernel."""

    even: Any
    """[PAIRS, ROWS], the weighted sum of the keys' even values"""
    odd: Any
    top: Any
    """[ROWS], the highest score"""
    total: Any
    """[ROWS], the sum of the weights relative to it"""


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
    result = Result(out, out, out)
    if splits > 1:
        parts = torch.empty((num_tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((num_tokens, heads, splits, 2), dtype=torch.float32, device=q.device)
        result = Result(out, parts, stats)
    # With few queries half the registers do, and two programs fit a multiprocessor; where they do not, ptxas should not
    # try, as it does when it is not told.
    halved = block_t * block_h == 8 and dtype.itemsize == 2 and not device.native_fp8
    rope = 0 if cos_sin is None else cos_sin.shape[1]
    cos_sin = q if cos_sin is None else cos_sin.contiguous()
    listed = q if indices is None else indices
    plan = Plan(
        rope, ratio, indices is not None, 1 if indices is None else block(num_entries),
        block_t, block_h, block_k, splits > 1, entries.rows_per_page, _TYPES[dtype],
    )  # fmt: skip
    launch(
        # Programs that share keys start next to each other, so that one finds in the L2 what the other has read.
        _attend, (token_blocks * head_blocks, block_t * splits),
        Queries(q, q.stride(0), q.stride(1), sinks, positions, request, cos_sin, scale * _LOG2_E), result,
        rows_of(window), rows_of(entries), Strided(listed, listed.stride(0)),
        num_tokens, heads, window_size, num_entries, splits,
        PLAN=plan, LAYOUT=layout_of(window, device.native_fp8, smallest=64),
        num_warps=8, num_stages=1, maxnreg=128 if halved else 255,
    )  # fmt: skip
    if splits > 1:
        launch(
            _merge, (num_tokens, heads, triton.cdiv(dim, 2 * _MERGED)),
            result, sinks, cos_sin, heads, splits,
            DIM=dim, ROPE=rope, PAIRS=_MERGED, BLOCK_S=block(splits), num_warps=4,
        )  # fmt: skip
    return out


@functools.cache
def _splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Into how many parts each program's tiles of keys are divided, so that little is idle in the last round.

    A part costs its share of the tiles and as much as `_FIXED` tiles in addition.
    """
    most = max(1, min(tiles // 2, _MOST_SPLITS))
    return min(range(1, most + 1), key=lambda s: triton.cdiv(programs * s, multiprocessors) * (tiles / s + _FIXED))


@triton.jit(do_not_specialize=["num_tokens", "heads", "window_size", "num_entries", "splits"])
def _attend(
    queries: Queries, result: Result, window: Rows, entries: Rows, listed: Strided,
    num_tokens, heads, window_size, num_entries, splits, PLAN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    BLOCK_T: tl.constexpr = PLAN.block_t
    BLOCK_H: tl.constexpr = PLAN.block_h
    BLOCK_K: tl.constexpr = PLAN.block_k
    DTYPE: tl.constexpr = PLAN.dtype
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    PAIRS: tl.constexpr = LAYOUT.block // 2
    head_blocks = tl.cdiv(heads, BLOCK_H)
    t0, split = tl.program_id(0) // head_blocks * BLOCK_T, tl.program_id(1) // BLOCK_T
    run = run_of(queries.positions, queries.request, t0, num_tokens, tl.program_id(1) % BLOCK_T, BLOCK_T)
    if run.owner < 0:
        return
    r = tl.arange(0, ROWS)
    h0 = tl.program_id(0) % head_blocks * BLOCK_H
    t, h = t0 + r // BLOCK_H, h0 + r % BLOCK_H
    position = run.first + t - run.start
    live = (position >= run.first) & (position <= run.final) & (h < heads)
    visible_to_row = position
    if PLAN.ratio > 0:
        visible_to_row = (position + 1) // PLAN.ratio
    q_even, q_odd = _load_pairs(queries, t, h, live, LAYOUT, DTYPE)

    indices = listed.data
    if PLAN.listed:
        indices += t0.to(tl.int64) * listed.stride
    reach = reach_of(run, indices, window_size, num_entries, PLAN)
    begin, end = reach.tiles * split // splits, reach.tiles * (split + 1) // splits
    m = tl.full((ROWS,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_K, ROWS), tl.float32)
    even, odd = tl.zeros((PAIRS, ROWS), tl.float32), tl.zeros((PAIRS, ROWS), tl.float32)
    number, valid, in_window = numbers(begin, end, reach, indices, num_entries, PLAN)
    fetched = _fetch(number, valid, in_window, run.owner, window, entries, PLAN, LAYOUT)
    for i in range(begin, end):
        # A tile is loaded while the one before it is multiplied.
        k_even, k_odd = decode(fetched, LAYOUT, BLOCK_K, window.pages.dtype.element_ty, DTYPE)
        number, valid, in_window = numbers(i + 1, end, reach, indices, num_entries, PLAN)
        fetched = _fetch(number, valid, in_window, run.owner, window, entries, PLAN, LAYOUT)
        # scores = k @ q.T * scale, -inf where a query does not see a key
        scores = _scores(q_even, k_even, ROWS) + _scores(q_odd, k_odd, ROWS)
        number, valid, in_window = numbers(i, end, reach, indices, num_entries, PLAN)
        seen = valid[:, None]
        if BLOCK_T > 1:
            seen &= number[:, None] <= tl.where(in_window, position, visible_to_row - 1)[None, :]
            seen &= number[:, None] > tl.where(in_window, position - window_size, -1)[None, :]
        scores = tl.where(seen, scores * queries.log2_scale, -float("inf"))
        # weights = (scores - top).exp(); l, acc = l + weights, acc + k.T @ weights, rescaled from m to top
        top = tl.maximum(m, tl.max(scores, axis=0))
        finite = tl.where(top > -float("inf"), top, 0.0)
        weights, kept = tl.exp2(scores - finite[None, :]), tl.exp2(m - finite)[None, :]
        m, l = top, l * kept + weights
        weights = weights.to(DTYPE)
        even = tl.dot(tl.trans(k_even), weights, even * kept, input_precision="ieee")
        odd = tl.dot(tl.trans(k_odd), weights, odd * kept, input_precision="ieee")
    l = tl.sum(l, axis=0)

    # Zero, but not to the compiler, which would otherwise keep what it computed from `r` in registers that the loop
    # needs; for the same reason what is within a program's rows is addressed by 32 bits.
    zero = tl.minimum(num_tokens, 0)
    r += zero
    t, h = t0 + r // BLOCK_H, h0 + r % BLOCK_H
    live = (t >= run.start) & (t <= run.start + run.final - run.first) & (h < heads)
    at0, at = t0.to(tl.int64) * heads + h0, r // BLOCK_H * heads + r % BLOCK_H
    if PLAN.split:
        some = live & (h < tl.where(begin < end, heads, 0))
        _store_part(result, Sums(even, odd, m, l), at0, at * splits + split, zero, splits, live, some, LAYOUT)
    else:
        _store_out(queries, result, Sums(even, odd, m, l), at0, at, t0, h, live, num_tokens, PLAN, LAYOUT)


@triton.jit
def _load_pairs(queries: Queries, t, h, live, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """The even and the odd values of the queries of tokens t and heads h [ROWS], [ROWS, PAIRS] each."""
    row = queries.data + t.to(tl.int64)[:, None] * queries.token_stride + h.to(tl.int64)[:, None] * queries.head_stride
    d = 2 * tl.arange(0, LAYOUT.block // 2)[None, :]
    even = tl.load(row + d, mask=live[:, None] & (d < LAYOUT.dim), other=0.0).to(DTYPE)  # [ROWS, PAIRS]
    odd = tl.load(row + d + 1, mask=live[:, None] & (d + 1 < LAYOUT.dim), other=0.0).to(DTYPE)  # [ROWS, PAIRS]
    return even, odd


@triton.jit
def _fetch(number, valid, in_window, request, window: Rows, entries: Rows, PLAN: tl.constexpr, LAYOUT: tl.constexpr):
    """Rows of the window or entries, by their numbers [BLOCK_K]."""
    WINDOW_ROWS: tl.constexpr = LAYOUT.rows
    ENTRY_ROWS: tl.constexpr = PLAN.entry_rows
    # A branch, because the compiler loses the alignment of addresses that a `where` chooses.
    if in_window:
        page, row = locate(window, request, number, valid, WINDOW_ROWS)
        data = window.pages + page * window.page_stride + row * LAYOUT.data
        scales = data + (WINDOW_ROWS * LAYOUT.data + row * (LAYOUT.scales - LAYOUT.data))
    else:
        page, row = locate(entries, request, number, valid, ENTRY_ROWS)
        data = entries.pages + page * entries.page_stride + row * LAYOUT.data
        scales = data + (ENTRY_ROWS * LAYOUT.data + row * (LAYOUT.scales - LAYOUT.data))
    return fetch(data, scales, valid, LAYOUT)


@triton.jit
def _scores(query, k, ROWS: tl.constexpr):
    """k @ query.T: every key [BLOCK_K, D] with every query [ROWS, D], as [BLOCK_K, ROWS]."""
    if ROWS < 16:
        scores = tl.dot(k, tl.trans(query), input_precision="ieee")
    else:
        # Transposed afterwards, or the compiler gives every warp all the keys.
        scores = tl.trans(tl.dot(query, tl.trans(k), input_precision="ieee"))
    return scores


@triton.jit
def _store_part(result: Result, sums: Sums, at0, at, zero, splits, live, some, LAYOUT: tl.constexpr):
    """One split's sums of queries number at0 + at // splits; `some`: the values of those that are not zeros."""
    stats = result.stats + at0 * splits * 2
    tl.store(stats + at * 2, sums.top, mask=live)  # [ROWS]
    tl.store(stats + at * 2 + 1, sums.total, mask=live)  # [ROWS]
    parts = result.parts + at0 * splits * LAYOUT.dim
    j = zero + tl.arange(0, LAYOUT.block // 2)[:, None]
    mask = some[None, :] & (2 * j < LAYOUT.dim)
    tl.store(parts + (at[None, :] * LAYOUT.dim + j), sums.even, mask=mask)  # [PAIRS, ROWS]
    tl.store(parts + (at[None, :] * LAYOUT.dim + LAYOUT.dim // 2 + j), sums.odd, mask=mask)  # [PAIRS, ROWS]


@triton.jit
def _store_out(
    queries: Queries, result: Result, sums: Sums, at0, at, t0, h, live, num_tokens,
    PLAN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The result of queries number at0 + at."""
    BLOCK_T: tl.constexpr = PLAN.block_t
    BLOCK_H: tl.constexpr = PLAN.block_h
    ROWS: tl.constexpr = BLOCK_T * BLOCK_H
    DIM: tl.constexpr = LAYOUT.dim
    ROPE: tl.constexpr = PLAN.rope
    PAIRS: tl.constexpr = LAYOUT.block // 2
    # x = acc / (l + (sink - top).exp())
    sink = tl.load(queries.sinks + h, mask=live, other=0.0)  # [ROWS]
    share = _share(sums.top, sums.total, sink)[None, :]
    even, odd = sums.even * share, sums.odd * share
    # x = apply_rope(x, cos_sin, inverse=True)
    if ROPE > 0:
        # Angles are loaded once per token, not per head.
        d, b = 2 * tl.arange(0, PAIRS)[:, None], t0 + tl.arange(0, BLOCK_T)[None, :]
        cos, sin = load_rotary(queries.cos_sin, tl.minimum(b, num_tokens - 1), d, DIM, ROPE, True)
        cos = tl.broadcast_to(cos[:, :, None], (PAIRS, BLOCK_T, BLOCK_H)).reshape(PAIRS, ROWS)
        sin = tl.broadcast_to(sin[:, :, None], (PAIRS, BLOCK_T, BLOCK_H)).reshape(PAIRS, ROWS)
        even, odd = even * cos + odd * sin, odd * cos - even * sin
    dtype = result.out.dtype.element_ty
    x = tl.join(tl.trans(even.to(dtype)), tl.trans(odd.to(dtype))).reshape(ROWS, 2 * PAIRS)
    d = tl.arange(0, 2 * PAIRS)[None, :]
    tl.store(result.out + at0 * DIM + (at[:, None] * DIM + d), x, mask=live[:, None] & (d < DIM))  # [ROWS, BLOCK_D]


@triton.jit
def _share(m, l, sink):
    """What a sum of values weighted by 2^(score - m) is multiplied by; l is the sum of the weights, 0 without a key."""
    total = l + tl.exp2(sink * 1.4426950408889634 - tl.where(m > -float("inf"), m, 0.0))
    # Without any key the values are zeros already; NaN must stay NaN.
    return 1.0 / tl.where(l == 0, 1.0, total)


@triton.jit(do_not_specialize=["heads", "splits"])
def _merge(
    result: Result, sinks, cos_sin, heads, splits,
    DIM: tl.constexpr, ROPE: tl.constexpr, PAIRS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A token's head: its parts, weighted as their highest scores say, and what `_store_out` does."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, j = tl.arange(0, BLOCK_S), tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    at = t * heads + h
    stats = result.stats + (at * splits + s) * 2
    m = tl.load(stats, mask=s < splits, other=-float("inf"))  # [BLOCK_S]
    l = tl.load(stats + 1, mask=s < splits, other=0.0)  # [BLOCK_S]
    # weights = (m - m.max()).exp(); x = (parts * weights[:, None]).sum(0) / ((l * weights).sum() + sink)
    top = tl.max(m, axis=0)
    weights = tl.exp2(m - tl.where(top > -float("inf"), top, 0.0))
    share = _share(top, tl.sum(l * weights, axis=0), tl.load(sinks + h))
    part, mask = result.parts + (at * splits + s)[:, None] * DIM + j[None, :], (m > -float("inf"))[:, None]
    mask &= (2 * j < DIM)[None, :]
    even = tl.sum(tl.load(part, mask=mask, other=0.0) * weights[:, None], axis=0) * share  # [BLOCK_S, PAIRS]
    odd = tl.sum(tl.load(part + DIM // 2, mask=mask, other=0.0) * weights[:, None], axis=0) * share  # [BLOCK_S, PAIRS]
    # x = apply_rope(x, cos_sin, inverse=True)
    if ROPE > 0:
        cos, sin = load_rotary(cos_sin, t, 2 * j, DIM, ROPE, True)
        even, odd = even * cos + odd * sin, odd * cos - even * sin
    d = tl.program_id(2) * PAIRS * 2 + tl.arange(0, PAIRS * 2)
    x = tl.join(even, odd).reshape(PAIRS * 2).to(result.out.dtype.element_ty)
    tl.store(result.out + at * DIM + d, x, mask=d < DIM)  # [2 * PAIRS]
