from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rows import PagedRows, RowFormat
from .codecs import decode_e2m1, encode_e2m1, power_of_two, scale_byte
from .hadamard import hadamard
from .launch import block, device_of, launch
from .rope import load_rotary, rotate
from .rows import format_constants, load_rows, locate, row_args
from .topk import topk as select

_WORKSPACE = 1 << 24
"""Scores (fp32) that exist at once; the tokens are scored in chunks that need no more."""
BLOCK_N = 128
"""Entries of a tile, the same for every batch so that a score has the same bits in each."""
BLOCK_T = 16
"""Tokens that use a tile while it is there, where requests have several; chunks are multiples."""
_TILE = 2048  # values that one program prepares
_PROGRAMS = 8  # for each multiprocessor


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
    block_h, block_d = block(heads, 16), format_constants(entries.format)["BLOCK_D"]
    each = min(block_h, max(1, _TILE // block_d))
    dtype = _dot_dtype(q.dtype, entries.format)
    queries = torch.empty((num_tokens, block_h, block_d), dtype=dtype, device=device)
    factors = torch.empty((num_tokens, block_h), dtype=torch.float32, device=device)
    counts = torch.empty(num_tokens, dtype=torch.int32, device=device)
    launch(
        _prepare, (num_tokens, block_h // each),
        q, *q.stride(), cos_sin.contiguous(), weights, *weights.stride(), positions, queries, factors, counts,
        heads, max_entries, scale,
        RATIO=ratio, TOPK=topk, DIM=dim, ROPE=cos_sin.shape[1], ROUND=entries.format.codec == "e2m1",
        N=each, BLOCK_H=block_h, BLOCK_D=block_d, LOG2_DIM=dim.bit_length() - 1, num_warps=4,
    )  # fmt: skip
    row = triton.cdiv(max_entries, BLOCK_N) * BLOCK_N
    chunk = max(1, _WORKSPACE // row // BLOCK_T * BLOCK_T)
    scores = torch.empty((min(chunk, num_tokens), row), dtype=torch.float32, device=device)
    for start in range(0, num_tokens, chunk):
        part = slice(start, start + chunk)
        if max_entries > topk:
            _score(
                queries[part], factors[part], counts[part], request[part], entries, scores, heads, topk, max_entries,
                num_tokens > entries.block_table.shape[0],
            )  # fmt: skip
        select(scores, counts[part], selected[part], limit=max_entries)
    return selected


def _dot_dtype(queries: torch.dtype, fmt: RowFormat) -> torch.dtype:
    """What both sides of the product are held in.

    Exact for both, but for 8-bit keys under fp16 queries: blocks of them whose largest value is below 0.014.
    """
    if fmt.codec == "e2m1":
        return torch.bfloat16
    return queries if fmt.codec == "e4m3" or fmt.dtype == queries else torch.float32


def _score(
    queries: torch.Tensor, factors: torch.Tensor, counts: torch.Tensor, request: torch.Tensor, entries: PagedRows,
    scores: torch.Tensor, heads: int, topk: int, max_entries: int, several: bool,
) -> None:  # fmt: skip
    """Write the scores [T, >= counts] fp32 of prepared queries; nothing for tokens that need none.

    `several`: requests have more than one token each.
    """
    num_tokens, block_h, _ = queries.shape
    shared = several and queries.dtype != torch.float32
    groups = triton.cdiv(num_tokens, BLOCK_T) if shared else num_tokens
    device = device_of(queries)
    splits = min(triton.cdiv(max_entries, BLOCK_N), triton.cdiv(_PROGRAMS * device.multiprocessors, max(1, groups)))
    launch(
        _score_shared if shared else _score_single, (groups, splits),
        queries, factors, counts, request, scores, scores.stride(0), *row_args(entries), num_tokens, heads,
        TOPK=topk, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, BLOCK_H=block_h, ROWS=entries.rows_per_page,
        NATIVE=device.native_fp8, **format_constants(entries.format),
        # So that two programs share a multiprocessor, also where it has 100 KB of shared memory.
        num_warps=8, maxnreg=128, num_stages=2 if shared or entries.format.codec == "plain" else 3,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "max_entries"])
def _prepare(
    q, q_stride, head_stride, dim_stride, cos_sin, weights, weight_stride, weight_head_stride, positions,
    queries, factors, counts, heads, max_entries, scale,
    RATIO: tl.constexpr, TOPK: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, ROUND: tl.constexpr,
    N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_DIM: tl.constexpr,
):  # fmt: skip
    """A token's count of visible entries and, where it must choose among them, N of its queries and their factors."""
    t, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.minimum((tl.load(positions + t) + 1) // RATIO, max_entries).to(tl.int32)
    if group == 0:
        tl.store(counts + t, count)
    if count > TOPK:
        h, d = group * N + tl.arange(0, N), tl.arange(0, BLOCK_D)[None, :]
        factor = tl.load(weights + t * weight_stride + h * weight_head_stride, mask=h < heads, other=0.0)
        tl.store(factors + t * BLOCK_H + h, factor.to(tl.float32) * scale)
        source = q + t * q_stride + h[:, None].to(tl.int64) * head_stride + d * dim_stride
        x = tl.load(source, mask=(h[:, None] < heads) & (d < DIM), other=0.0).to(tl.float32)
        cos, sin = load_rotary(cos_sin, t, d, DIM, ROPE, False)
        x = rotate(x, cos, sin, N, BLOCK_D).to(q.dtype.element_ty).to(tl.float32)
        if ROUND:
            x = _round_e2m1(x, N, DIM, LOG2_DIM)
        tl.store(queries + (t * BLOCK_H + h[:, None]) * BLOCK_D + d, x.to(queries.dtype.element_ty))


@triton.jit
def _round_e2m1(x, N: tl.constexpr, DIM: tl.constexpr, LOG2_DIM: tl.constexpr):
    """[N, DIM] fp32 to what 4-bit rows of it mean."""
    x = hadamard(x, N, DIM, LOG2_DIM).reshape(N, DIM // 32, 32)
    byte = scale_byte(tl.max(tl.abs(x), axis=2), 6.0 * 2.0**-126, 6.0)[:, :, None]
    x = tl.minimum(tl.maximum(x * power_of_two(254 - byte.to(tl.int32)), -6.0), 6.0)
    return (decode_e2m1(encode_e2m1(x)) * power_of_two(byte)).reshape(N, DIM)


@triton.jit(do_not_specialize=["num_tokens", "heads"])
def _score_single(
    queries, factors, counts, request, scores, score_stride, pages, page_stride, table, table_stride, num_tokens, heads,
    TOPK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr, CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr, DATA: tl.constexpr,
    SCALES: tl.constexpr, BLOCK_D: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One token: its queries stay, the tiles pass."""
    t = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + t)
    if count > TOPK:
        r = tl.load(request + t)
        FP32: tl.constexpr = queries.dtype.element_ty == tl.float32
        if not FP32:
            query, factor = _load_query(queries, factors, t, BLOCK_H, BLOCK_D)
        for tile in tl.range(tl.program_id(1), tl.cdiv(count, BLOCK_N), tl.num_programs(1)):
            s = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            page, row = locate(table, table_stride, r, s, s < count, ROWS)
            keys = load_rows(
                pages, page_stride, page, row, s < count,
                BLOCK_N, ROWS, CODEC, DIM, QUANTISED, DATA, SCALES, BLOCK_D, NATIVE, queries.dtype.element_ty,
            )  # fmt: skip
            if FP32:
                score = _weigh_by_head(keys, queries, factors, t, heads, BLOCK_N, BLOCK_H, BLOCK_D)
            else:
                score = _weigh(keys, query, factor)
            tl.store(scores + t * score_stride + s, score, mask=s < count)


@triton.jit(do_not_specialize=["num_tokens", "heads"])
def _score_shared(
    queries, factors, counts, request, scores, score_stride, pages, page_stride, table, table_stride, num_tokens, heads,
    TOPK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr, CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr, DATA: tl.constexpr,
    SCALES: tl.constexpr, BLOCK_D: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens, run by run of one request: a tile stays while the run's queries pass."""
    base, i = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.arange(0, BLOCK_T)
    inside = base + i < num_tokens
    count = tl.load(counts + base + i, mask=inside, other=0)
    count = tl.where(count > TOPK, count, 0)
    requests = tl.load(request + base + i, mask=inside, other=-1).to(tl.int32)
    start = tl.zeros((), tl.int32)
    while start < BLOCK_T:
        r = tl.sum(tl.where(i == start, requests, 0))
        stop = tl.min(tl.where((i > start) & (requests != r), i, BLOCK_T))
        in_run = (i >= start) & (i < stop)
        most = tl.max(tl.where(in_run, count, 0))
        for tile in tl.range(tl.program_id(1), tl.cdiv(most, BLOCK_N), tl.num_programs(1)):
            s = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            page, row = locate(table, table_stride, r, s, s < most, ROWS)
            keys = load_rows(
                pages, page_stride, page, row, s < most,
                BLOCK_N, ROWS, CODEC, DIM, QUANTISED, DATA, SCALES, BLOCK_D, NATIVE, queries.dtype.element_ty,
            )  # fmt: skip
            # Later tokens see more. Where one does not, it gets scores that nobody reads.
            first = tl.min(tl.where(in_run & (count > tile * BLOCK_N), i, BLOCK_T))
            for j in tl.range(first, stop):
                t = base + j
                query, factor = _load_query(queries, factors, t, BLOCK_H, BLOCK_D)
                tl.store(scores + t * score_stride + s, _weigh(keys, query, factor), mask=s < most)
        start = stop


@triton.jit
def _load_query(queries, factors, t, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """A token's prepared queries [BLOCK_H, BLOCK_D] and their factors [BLOCK_H]."""
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)[None, :]
    return tl.load(queries + t * (BLOCK_H * BLOCK_D) + (h[:, None] * BLOCK_D + d)), tl.load(factors + t * BLOCK_H + h)


@triton.jit
def _weigh(keys, query, factor):
    """Scores [N] fp32 of keys [N, D]. A NaN stays one, as in the reference."""
    dots = tl.dot(keys, tl.trans(query))
    return tl.sum(tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor[None, :], axis=1)


@triton.jit
def _weigh_by_head(
    keys, queries, factors, t, heads, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The same of fp32 keys: a dot of fp32 tiles of this depth would need more registers than there are."""
    score = tl.zeros((BLOCK_N,), tl.float32)
    for h in range(heads):
        query = tl.load(queries + (t * BLOCK_H + h) * BLOCK_D + tl.arange(0, BLOCK_D))
        dots = tl.sum(keys * query[None, :], axis=1)
        score += tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * tl.load(factors + t * BLOCK_H + h)
    return score
