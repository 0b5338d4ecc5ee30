from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..rows import PagedRows, RowFormat
from .codecs import decode_e2m1, divided, encode_e2m1, magnitude, power_of_two, scale_byte
from .hadamard import hadamard
from .launch import Pointer, Strided, block, device_of, launch
from .rope import load_rotary, rotate
from .rows import Rows, layout_of, load_rows, locate, rows_of
from .topk import topk as select

_WORKSPACE = 1 << 24
"""Scores (fp32) that exist at once; the tokens are scored in chunks that need no more."""
BLOCK_N = 128
"""Entries of a tile, the same for every batch so that a score has the same bits in each."""
BLOCK_T = 16
"""Tokens that use a tile while it is there, where requests have several; chunks are multiples."""
_SINGLE_KB = 58  # of shared memory that a program of `_score_single` takes with 4-bit keys loaded ahead
_TILE = 2048  # values that one program prepares
_PROGRAMS = 8  # for each multiprocessor


class Queries(NamedTuple):
    """[T, H, D]; strides in elements."""

    data: Pointer
    token_stride: int
    head_stride: int
    dim_stride: int


class Weights(NamedTuple):
    """[T, H]; strides in elements."""

    data: Pointer
    token_stride: int
    head_stride: int


class Prepared(NamedTuple):
    """What scoring reads of each token."""

    queries: Pointer
    """[T, BLOCK_H, BLOCK_D], rotated"""
    factors: Pointer
    """[T, BLOCK_H] fp32, each head's weight in a score"""
    counts: Pointer
    """[T] int32, the entries that the token sees"""


class Preparation(NamedTuple):
    """What `_prepare` is compiled for."""

    ratio: int
    topk: int
    dim: int
    rope: int
    round: bool
    """Whether queries are rounded to 4 bits."""
    n: int
    """Heads of a program."""
    block_h: int
    block_d: int


class Scoring(NamedTuple):
    """What scoring is compiled for."""

    topk: int
    block_t: int
    block_n: int
    block_h: int
    hide: bool
    """Whether Triton is not to see that keys have 4 bits."""


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
    width, device = min(topk, max_entries), q.device
    selected = torch.empty((num_tokens, width), dtype=torch.int32, device=device)
    if width == 0:
        return selected
    block_h, block_d = block(heads, 16), layout_of(entries, device_of(q).native_fp8).block
    each = min(block_h, max(1, _TILE // block_d))
    prepared = Prepared(
        torch.empty((num_tokens, block_h, block_d), dtype=_dot_dtype(q.dtype, entries.format), device=device),
        torch.empty((num_tokens, block_h), dtype=torch.float32, device=device),
        torch.empty(num_tokens, dtype=torch.int32, device=device),
    )
    preparation = Preparation(
        ratio, topk, dim, cos_sin.shape[1], entries.format.codec == "e2m1", each, block_h, block_d
    )
    launch(
        _prepare, (num_tokens, block_h // each),
        Queries(q, *q.stride()), cos_sin.contiguous(), Weights(weights, *weights.stride()), positions, prepared,
        heads, max_entries, scale, PLAN=preparation, num_warps=4,
    )  # fmt: skip
    row = triton.cdiv(max_entries, BLOCK_N) * BLOCK_N
    chunk = max(1, _WORKSPACE // row // BLOCK_T * BLOCK_T)
    scores = torch.empty((min(chunk, num_tokens), row), dtype=torch.float32, device=device)
    for start in range(0, num_tokens, chunk):
        part = slice(start, start + chunk)
        some = Prepared(*(tensor[part] for tensor in prepared))
        if max_entries > topk:
            several = num_tokens > entries.block_table.shape[0]
            _score(some, request[part], entries, scores, heads, topk, max_entries, several)
        select(scores, some.counts, selected[part], limit=max_entries)
    return selected


def _dot_dtype(queries: torch.dtype, fmt: RowFormat) -> torch.dtype:
    """What both sides of the product are held in.

    Exact for both, except for 8-bit keys under fp16 queries: blocks of them whose largest value is below 0.014.
    """
    if fmt.codec == "e2m1":
        return torch.bfloat16
    return queries if fmt.codec == "e4m3" or fmt.dtype == queries else torch.float32


def _score(
    prepared: Prepared, request: torch.Tensor, entries: PagedRows, scores: torch.Tensor,
    heads: int, topk: int, max_entries: int, several: bool,
) -> None:  # fmt: skip
    """Write the scores [T, >= counts] fp32 of prepared queries; nothing for tokens that need none.

    `several`: requests have more than one token each.
    """
    num_tokens, block_h, _ = prepared.queries.shape
    shared = several and prepared.queries.dtype != torch.float32
    groups = triton.cdiv(num_tokens, BLOCK_T) if shared else num_tokens
    device = device_of(scores)
    splits = min(triton.cdiv(max_entries, BLOCK_N), triton.cdiv(_PROGRAMS * device.multiprocessors, max(1, groups)))
    # GPUs with less shared memory than SM90 and SM100 multiply fragments of a warp instead of whole tiles.
    hide = entries.format.codec == "e2m1" and device.shared_kb < 228
    # So that two programs share a multiprocessor, also where it has 100 KB of shared memory: there, tiles of 4-bit keys
    # are not loaded ahead.
    stages = 2 if shared or entries.format.codec == "plain" else 3
    if hide and not shared and device.shared_kb < 2 * _SINGLE_KB:
        stages = 1
    launch(
        _score_shared if shared else _score_single, (groups, splits),
        prepared, request, Strided(scores, scores.stride(0)), rows_of(entries), num_tokens, heads,
        PLAN=Scoring(topk, BLOCK_T, BLOCK_N, block_h, hide), LAYOUT=layout_of(entries, device.native_fp8),
        num_warps=8, maxnreg=128, num_stages=stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "max_entries"])
def _prepare(
    q: Queries, cos_sin, weights: Weights, positions, prepared: Prepared, heads, max_entries, scale,
    PLAN: tl.constexpr,
):  # fmt: skip
    """A token's count of visible entries and, where it must choose among them, N of its queries and their factors."""
    N: tl.constexpr = PLAN.n
    DIM: tl.constexpr = PLAN.dim
    ROPE: tl.constexpr = PLAN.rope
    BLOCK_D: tl.constexpr = PLAN.block_d
    t, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.minimum((tl.load(positions + t) + 1) // PLAN.ratio, max_entries).to(tl.int32)
    if group == 0:
        tl.store(prepared.counts + t, count)
    if count > PLAN.topk:
        # factors = weights * scale
        h, d = group * N + tl.arange(0, N), tl.arange(0, BLOCK_D)[None, :]
        at = weights.data + t * weights.token_stride + h * weights.head_stride
        factor = tl.load(at, mask=h < heads, other=0.0)  # [N]
        tl.store(prepared.factors + t * PLAN.block_h + h, factor.to(tl.float32) * scale)  # [N]
        # queries = apply_rope(q, cos_sin)
        at = q.data + t * q.token_stride + h[:, None].to(tl.int64) * q.head_stride + d * q.dim_stride
        mask = (h[:, None] < heads) & (d < DIM)
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [N, BLOCK_D]
        cos, sin = load_rotary(cos_sin, t, d, DIM, ROPE, False)
        x = rotate(x, cos, sin, N, BLOCK_D).to(q.data.dtype.element_ty).to(tl.float32)
        if PLAN.round:
            x = _round_e2m1(x, N, DIM)
        at = prepared.queries + (t * PLAN.block_h + h[:, None]) * BLOCK_D + d
        tl.store(at, x.to(prepared.queries.dtype.element_ty))  # [N, BLOCK_D]


@triton.jit
def _round_e2m1(x, N: tl.constexpr, DIM: tl.constexpr):
    """[N, DIM] fp32 to what 4-bit rows of it mean: dequantise(*quantise(x, RowFormat.fp4(DIM)), ...)."""
    x = hadamard(x, N, DIM).reshape(N, DIM // 32, 32)
    byte = scale_byte(tl.max(magnitude(x), axis=2), 6.0 * 2.0**-126, 6.0)[:, :, None]
    return (decode_e2m1(encode_e2m1(divided(x, byte, 6.0))) * power_of_two(byte)).reshape(N, DIM)


@triton.jit(do_not_specialize=["num_tokens", "heads"])
def _score_single(
    prepared: Prepared, request, scores: Strided, entries: Rows, num_tokens, heads,
    PLAN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """One token: its queries stay, the tiles pass."""
    BLOCK_N: tl.constexpr = PLAN.block_n
    BLOCK_H: tl.constexpr = PLAN.block_h
    BLOCK_D: tl.constexpr = LAYOUT.block
    t = tl.program_id(0).to(tl.int64)
    count = tl.load(prepared.counts + t)
    if count > PLAN.topk:
        r = tl.load(request + t)
        FP32: tl.constexpr = prepared.queries.dtype.element_ty == tl.float32
        if not FP32:
            query, factor = _load_query(prepared, t, BLOCK_H, BLOCK_D)
        for tile in tl.range(tl.program_id(1), tl.cdiv(count, BLOCK_N), tl.num_programs(1)):
            s = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            keys = _load_keys(entries, r, s, s < count, PLAN, LAYOUT, prepared.queries.dtype.element_ty)
            # scores[t, s] = ((keys[s] @ queries[t].T).relu() * factors[t]).sum(-1)
            if FP32:
                score = _weigh_by_head(keys, prepared, t, heads, BLOCK_N, BLOCK_H, BLOCK_D)
            else:
                score = _weigh(keys, query, factor)
            tl.store(scores.data + t * scores.stride + s, score, mask=s < count)  # [BLOCK_N]


@triton.jit(do_not_specialize=["num_tokens", "heads"])
def _score_shared(
    prepared: Prepared, request, scores: Strided, entries: Rows, num_tokens, heads,
    PLAN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens, run by run of one request: a tile stays while the run's queries pass."""
    BLOCK_T: tl.constexpr = PLAN.block_t
    BLOCK_N: tl.constexpr = PLAN.block_n
    BLOCK_H: tl.constexpr = PLAN.block_h
    BLOCK_D: tl.constexpr = LAYOUT.block
    base, i = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.arange(0, BLOCK_T)
    start = tl.zeros((), tl.int32)
    while start < BLOCK_T:
        requests = tl.load(request + base + i, mask=base + i < num_tokens, other=-1).to(tl.int32)  # [BLOCK_T]
        r = tl.sum(tl.where(i == start, requests, 0))
        stop = tl.min(tl.where((i > start) & (requests != r), i, BLOCK_T))
        most = tl.max(_counts(prepared, base, i, start, stop, num_tokens, PLAN))
        for tile in tl.range(tl.program_id(1), tl.cdiv(most, BLOCK_N), tl.num_programs(1)):
            s = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            keys = _load_keys(entries, r, s, s < most, PLAN, LAYOUT, prepared.queries.dtype.element_ty)
            # Later tokens see more. One that does not gets scores that are not read.
            count = _counts(prepared, base, i, start, stop, num_tokens, PLAN)
            first = tl.min(tl.where(count > tile * BLOCK_N, i, BLOCK_T))
            # What is hoisted, here or by loading all counts once, takes registers that the products need.
            for j in tl.range(first, stop, disable_licm=True):
                # scores[t, s] = ((keys[s] @ queries[t].T).relu() * factors[t]).sum(-1)
                t = base + j
                query, factor = _load_query(prepared, t, BLOCK_H, BLOCK_D)
                score = _weigh(keys, query, factor)
                tl.store(scores.data + t * scores.stride + s, score, mask=s < most)  # [BLOCK_N]
        start = stop


@triton.jit
def _counts(prepared: Prepared, base, i, start, stop, num_tokens, PLAN: tl.constexpr):
    """How many entries each of the tokens start..stop-1 of base + i [BLOCK_T] scores; 0 if it takes them all."""
    mask = (i >= start) & (i < stop) & (base + i < num_tokens)
    count = tl.load(prepared.counts + base + i, mask=mask, other=0)  # [BLOCK_T]
    return tl.where(count > PLAN.topk, count, 0)


@triton.jit
def _load_keys(entries: Rows, request, s, valid, PLAN: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """Entries number `s` [BLOCK_N] of a request, [BLOCK_N, BLOCK_D] of DTYPE."""
    ROWS: tl.constexpr = LAYOUT.rows
    N: tl.constexpr = PLAN.block_n
    page, row = locate(entries, request, s, valid, ROWS)
    keys = load_rows(entries, page, row, valid, LAYOUT, N, DTYPE)
    if PLAN.hide:
        # A sum of one value each. For what has 4 bits Triton chooses fragments that take three moves for each matrix
        # instruction, and more registers than there are.
        keys = tl.sum(keys.to(tl.float32).reshape(N, LAYOUT.block, 1), axis=2).to(DTYPE)
    return keys


@triton.jit
def _load_query(prepared: Prepared, t, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """A token's prepared queries [BLOCK_H, BLOCK_D] and their factors [BLOCK_H]."""
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)[None, :]
    query = tl.load(prepared.queries + t * (BLOCK_H * BLOCK_D) + (h[:, None] * BLOCK_D + d))  # [BLOCK_H, BLOCK_D]
    return query, tl.load(prepared.factors + t * BLOCK_H + h)  # [BLOCK_H]


@triton.jit
def _weigh(keys, query, factor):
    """((keys @ query.T).relu() * factor).sum(-1), [N] fp32 of keys [N, D]. A NaN stays one, as in the reference."""
    dots = tl.dot(keys, tl.trans(query))
    return tl.sum(tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor[None, :], axis=1)


@triton.jit
def _weigh_by_head(
    keys, prepared: Prepared, t, heads, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The same of fp32 keys: a dot of fp32 tiles of this depth would need more registers than there are."""
    score = tl.zeros((BLOCK_N,), tl.float32)
    for h in range(heads):
        query = tl.load(prepared.queries + (t * BLOCK_H + h) * BLOCK_D + tl.arange(0, BLOCK_D))  # [BLOCK_D]
        dots = tl.sum(keys * query[None, :], axis=1)
        factor = tl.load(prepared.factors + t * BLOCK_H + h)
        score += tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor
    return score
