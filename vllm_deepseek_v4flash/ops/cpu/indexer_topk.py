from __future__ import annotations

import torch

from ..rows import PagedRows
from . import threads
from .arithmetic import ONE, ZERO, rotate
from .compiling import Cache, helper, kernel
from .memory import (
    FP32,
    bits,
    code,
    fetch,
    fill,
    get,
    get_i32,
    get_i64,
    get_noalias,
    integer,
    load,
    packed,
    put,
    put_i32,
    put_noalias,
    rounded,
    size_of,
)
from .paged import E2M1, cache, page_of, read_rows, round_to_e2m1
from .products import dots_fp32

_TOKENS = 4  # of one request, sharing the keys read
_KEYS = 64  # read and scored together
_CHUNK = 1024  # keys of one item: a thread's share of a long context
_BINS = 2048
_WORKSPACE = 1 << 23  # scores held at once


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
    width = min(topk, max_entries)
    selected = torch.empty((num_tokens, width), dtype=torch.int32)
    if width == 0 or num_tokens == 0:
        return selected
    q, cos_sin, weights, positions, request = packed(q, cos_sin, weights, positions, request)
    rows, chunks = -(-heads // 4) * 4 * _TOKENS, -(-max_entries // _CHUNK)
    step = min(num_tokens, max(_TOKENS, _WORKSPACE // max_entries))
    scores = torch.empty((step, max_entries))
    for start in range(0, num_tokens, step):
        count = min(step, num_tokens - start)
        threads.run(
            _score, -(-count // _TOKENS) * chunks, float(count * max_entries * heads * dim),
            (rows + _KEYS) * dim + rows * _KEYS + rows,
            start, count, chunks, q.data_ptr(), code(q), heads, dim, cos_sin.data_ptr(), cos_sin.shape[1],
            weights.data_ptr(), code(weights), scale, cache(entries), positions.data_ptr(),
            request.data_ptr(), request.element_size() == 8, ratio, max_entries, scores.data_ptr(),
        )  # fmt: skip
        threads.run(
            _select, count, 8.0 * count * max_entries, _BINS,
            start, positions.data_ptr(), ratio, max_entries, width, scores.data_ptr(), selected.data_ptr(),
        )  # fmt: skip
    return selected


@helper
def _load_queries(t, q, dtype, heads, dim, cos_sin, rotary, codec, out):
    """A token's queries in the form of the keys: rotated, rounded to their dtype and, for 4-bit keys, to 4 bits."""
    load(q + t * heads * dim * size_of(dtype), dtype, heads * dim, out)
    for h in range(heads):
        row = out + 4 * h * dim
        tail = row + 4 * (dim - rotary)
        rotate(tail, cos_sin + 4 * t * rotary, rotary // 2, ONE)
        for i in range(rotary):
            put(tail, i, rounded(get(tail, i), dtype))
        if codec == E2M1:
            round_to_e2m1(row, dim)


@helper
def _weigh(dots, heads, weights, count, out):
    """For each key the sum over the heads of relu(dot) * weight, to `out`."""
    fill(out, count, ZERO)
    for h in range(heads):
        weight = get(weights, h)
        for i in range(count):
            dot = get_noalias(dots, h * _KEYS + i)
            # Not max: NaN must stay NaN.
            put_noalias(out, i, get(out, i) + (ZERO if dot <= ZERO else dot) * weight)


@kernel
def _score(
    begin: int, end: int, room: int,
    start: int, count: int, chunks: int, q: int, dtype: int, heads: int, dim: int, cos_sin: int, rotary: int,
    weights: int, weights_dtype: int, scale: float, entries: Cache, positions: int,
    request: int, wide: bool, ratio: int, max_entries: int, scores: int,
) -> None:  # fmt: skip
    padded = (heads + 3) // 4 * 4
    queries, keys = room, room + 4 * _TOKENS * padded * dim
    dots = keys + 4 * _KEYS * dim
    factors = dots + 4 * _TOKENS * padded * _KEYS
    fill(queries, _TOKENS * padded * dim, ZERO)
    for item in range(begin, end):
        first = start + item // chunks * _TOKENS
        last = min(first + _TOKENS, start + count)
        while first < last:
            owner = integer(request, wide, first)
            n = 1
            while first + n < last and integer(request, wide, first + n) == owner:
                n += 1
            visible = 0
            for t in range(first, first + n):
                visible = max(visible, min((get_i64(positions, t) + 1) // ratio, max_entries))
            from_key = item % chunks * _CHUNK
            to_key = min(from_key + _CHUNK, visible)
            if from_key < to_key:
                for i in range(n):
                    at = queries + 4 * i * padded * dim
                    _load_queries(first + i, q, dtype, heads, dim, cos_sin, rotary, entries[3], at)
                    factor = factors + 4 * i * padded
                    load(weights + (first + i) * heads * size_of(weights_dtype), weights_dtype, heads, factor)
                    for h in range(heads):
                        put(factor, h, get(factor, h) * scale)
            key = from_key
            while key < to_key:
                filled, source = min(_KEYS, to_key - key), keys
                if entries[3] == FP32:
                    page, row = page_of(entries, owner, key)
                    filled, source = min(filled, entries[2] - row), page + 4 * row * dim
                    if key + filled < to_key:
                        page, row = page_of(entries, owner, key + filled)
                        fetch(page + 4 * row * dim, 4 * dim * min(_KEYS, entries[2] - row))
                else:
                    read_rows(entries, owner, key, filled, keys)
                dots_fp32(queries, n * padded, source, filled, dim, dots, _KEYS)
                for i in range(n):
                    out = scores + 4 * ((first + i - start) * max_entries + key)
                    _weigh(dots + 4 * i * padded * _KEYS, heads, factors + 4 * i * padded, filled, out)
                key += filled
            first += n


@helper
def _rank(score):
    """0..2^32-1, in the order of the scores: both zeros equal, NaN as -inf."""
    if score != score:
        return 0x007FFFFF
    pattern = bits(score + ZERO)
    return 0xFFFFFFFF - pattern if pattern >> 31 else pattern | 0x80000000


@helper
def _threshold(scores, count, wanted, bins):
    """The rank of the `wanted`-th best of `count` scores, and how many of the scores of that rank to take."""
    known = 0
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        for i in range(1 << width):
            put_i32(bins, i, 0)
        for i in range(count):
            rank = _rank(get(scores, i))
            if rank >> (shift + width) == known:
                place = rank >> shift & ((1 << width) - 1)
                put_i32(bins, place, get_i32(bins, place) + 1)
        place = (1 << width) - 1
        while get_i32(bins, place) < wanted:
            wanted -= get_i32(bins, place)
            place -= 1
        known = known << width | place
    return known, wanted


@kernel
def _select(
    begin: int, end: int, room: int,
    start: int, positions: int, ratio: int, max_entries: int, width: int, scores: int, selected: int,
) -> None:  # fmt: skip
    for t in range(begin, end):
        visible = min((get_i64(positions, start + t) + 1) // ratio, max_entries)
        row, out = scores + 4 * t * max_entries, selected + 4 * (start + t) * width
        found = 0
        if visible <= width:
            for i in range(visible):
                put_i32(out, i, i)
            found = visible
        else:
            threshold, ties = _threshold(row, visible, width, room)
            for i in range(visible):
                rank = _rank(get(row, i))
                if rank > threshold or (rank == threshold and ties > 0):
                    put_i32(out, found, i)
                    found += 1
                    ties -= rank == threshold
        for i in range(found, width):
            put_i32(out, i, -1)
