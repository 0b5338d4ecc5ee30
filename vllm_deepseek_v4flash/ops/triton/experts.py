"""The routed experts in three launches: gate and up with the activation, down, and the sum over a token's experts.

A pair is a token and one of its experts, numbered as in `topk_ids`. A program of the products takes a chunk of the
pairs of one expert and reads a tile of that expert's weights, once. With few pairs every program finds its chunk by
looking through `topk_ids`; with many, a launch before sorts them by expert.

Nothing here depends on values that the host would have to read, and every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import block, device_of, launch
from .packed_weights import StoredWeight, pairable, product, tile_for

_SCANNED = 256  # pairs that a program looks through by itself
_SORTED = 1024  # pairs that a program of the sort takes in at a time
_WORKSPACE = 1 << 27  # bytes of the experts' outputs that wait for their sum
_SUMMED = 1024  # values that one program sums


def routed_experts(
    x: torch.Tensor,
    w13: StoredWeight,
    w2: StoredWeight,
    num_experts: int,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    swiglu_limit: float | None,
    first_expert: int,
) -> torch.Tensor:
    """`ops/packed_experts.py`'s [T, H] fp32; `w13` is w1 and w3 of every expert in turn."""
    x, ids, (num_tokens, topk) = pairable(x), topk_ids.contiguous(), topk_ids.shape
    hidden, inner, pairs = w2.rows, w2.columns, num_tokens * topk
    out = torch.empty((num_tokens, hidden), dtype=torch.float32, device=x.device)
    if num_experts == 0:
        return out.zero_()
    activations = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
    block_k, word, tile = tile_for(x.dtype, pairs / num_experts)
    chunks, *sorting = _chunks(ids, num_experts, first_expert, tile["BLOCK_T"])
    shared = (ids, *sorting, first_expert, pairs)
    shape = {
        "EXPERTS": num_experts, "BLOCK_E": block(num_experts), "BLOCK_P": 1 if sorting[0] is not None else
        block(pairs, 64), "TOPK": topk, "NATIVE": device_of(x).native_fp8,
    }  # fmt: skip
    args13, constants13 = w13.fitted(block_k, word)
    args2, constants2 = w2.fitted(block_k, word)
    if w13.perm is not None or (sorting[0] is not None and tile["BLOCK_T"] == 16):
        tile["maxnreg"] = 255  # or ptxas makes do with 80, and spills
    launch(
        _gate_up, (triton.cdiv(inner, tile["BLOCK_R"] // 2), chunks),
        x, activations, topk_weights.contiguous(), swiglu_limit, *shared, *args13, **shape, **constants13, **tile,
    )  # fmt: skip
    width = min(hidden, max(_WORKSPACE // max(1, pairs * x.element_size()) // 1024, 1) * 1024)
    outputs = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    block_h = min(block(hidden), _SUMMED)
    block_n = _SUMMED // block_h
    for start in range(0, hidden, width):
        stop = min(start + width, hidden)
        launch(
            _down, (triton.cdiv(stop - start, tile["BLOCK_R"]), chunks),
            activations, outputs, width, start, stop, *shared, *args2, **shape, **constants2, **tile,
        )  # fmt: skip
        launch(
            _sum, (triton.cdiv(num_tokens, block_n), triton.cdiv(stop - start, block_h)),
            outputs, width, start, stop, ids, first_expert, out, num_tokens,
            EXPERTS=num_experts, TOPK=topk, HIDDEN=hidden, BLOCK_N=block_n, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
    return out


def _chunks(ids: torch.Tensor, num_experts: int, first: int, size: int) -> tuple[Any, ...]:
    """How many chunks of `size` pairs there are at most; the pairs by expert, and where each expert's begin."""
    pairs = ids.numel()
    if pairs <= _SCANNED:
        return pairs, None, None
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    launch(_sort, (num_experts,), ids, order, starts, pairs, num_experts, first, BLOCK=_SORTED, num_warps=4)
    return min(pairs, triton.cdiv(pairs, size) + num_experts), order, starts


@triton.jit(do_not_specialize=["pairs", "first"])
def _sort(ids, order, starts, pairs, num_experts, first, BLOCK: tl.constexpr):
    """One expert's pairs, ascending, behind those of the experts before it."""
    e = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        expert = tl.load(ids + p, mask=p < pairs, other=0) - first
        before += ((expert >= 0) & (expert < e) & (p < pairs)).to(tl.int32)
    at = tl.sum(before)
    tl.store(starts + e, at)
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        mine = (tl.load(ids + p, mask=p < pairs, other=0) - first == e) & (p < pairs)
        rank = tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(order + at + rank, p, mask=mine)
        at += tl.sum(mine.to(tl.int32))
    if e == num_experts - 1:
        tl.store(starts + num_experts, at)


@triton.jit
def _chunk(
    ids, order, starts, first, pairs,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """This program's expert (EXPERTS: there is nothing to do), and where its pairs begin and its expert's end.

    They are numbered within the expert, or as in `order` where there is one.
    """
    if order is None:
        p, q = tl.program_id(1), tl.arange(0, BLOCK_P)
        expert = tl.load(ids + p) - first
        earlier = (tl.load(ids + q, mask=q < p, other=0) - first == expert) & (q < p)
        begin = tl.sum(earlier.to(tl.int32))
        end = pairs
        # The pair that would begin a chunk takes it.
        working = (expert >= 0) & (expert < EXPERTS) & (begin % BLOCK_T == 0)
        e = tl.where(working, expert, EXPERTS).to(tl.int32)
    else:
        c, n = tl.program_id(1), tl.arange(0, BLOCK_E)
        start = tl.load(starts + n, mask=n < EXPERTS, other=0)
        stop = tl.load(starts + n + 1, mask=n < EXPERTS, other=0)
        chunks = (stop - start + BLOCK_T - 1) // BLOCK_T
        # Experts whose chunks have all begun before this one; those beyond EXPERTS have none, and end with the last.
        e = tl.minimum(tl.sum((tl.cumsum(chunks) <= c).to(tl.int32)), EXPERTS)
        begin = tl.sum(tl.where(n == e, start, 0)) + (c - tl.sum(tl.where(n < e, chunks, 0))) * BLOCK_T
        end = tl.sum(tl.where(n == e, stop, 0))
    return e, begin, end


@triton.jit
def _members(ids, order, first, pairs, e, begin, end, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """The pairs [BLOCK_T] int32 of a chunk, and which of them exist."""
    wanted = begin + tl.arange(0, BLOCK_T)
    if order is None:
        q = tl.arange(0, BLOCK_P)
        same = (tl.load(ids + q, mask=q < pairs, other=0) - first == e) & (q < pairs)
        rank = tl.cumsum(same.to(tl.int32)) - 1
        hit = (same[None, :] & (rank[None, :] == wanted[:, None])).to(tl.int32)
        pair, valid = tl.sum(hit * q[None, :], axis=1), tl.sum(hit, axis=1) > 0
    else:
        valid = wanted < end
        pair = tl.load(order + wanted, mask=valid, other=0)
    return pair, valid


@triton.jit(do_not_specialize=["pairs", "first"])
def _gate_up(
    x, activations, weights, limit, ids, order, starts, first, pairs, data, scales, zeros, perm,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, TOPK: tl.constexpr, NATIVE: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """activations[pair] = weight * swiglu(w1 x, w3 x), for a tile of channels."""
    e, begin, end = _chunk(ids, order, starts, first, pairs, EXPERTS, BLOCK_E, BLOCK_P, BLOCK_T)
    if e < EXPERTS:
        pair, valid = _members(ids, order, first, pairs, e, begin, end, BLOCK_P, BLOCK_T)
        CHANNELS: tl.constexpr = BLOCK_R // 2
        # Eight rows of w1, then the same of w3, and so on: a thread of an mma instruction holds rows i and i + 8.
        r = tl.arange(0, BLOCK_R)
        half = r // 8 % 2
        channel = tl.program_id(0) * CHANNELS + r // 16 * 8 + r % 8
        inside = channel < ROWS
        matrix = e.to(tl.int64) * 2 + half
        token = (pair // TOPK).to(tl.int64)
        acc = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
        if perm is None:
            acc = product(
                x, token, valid, matrix, channel, inside, 0, tl.cdiv(COLUMNS, BLOCK_K), data, scales, zeros, perm, acc,
                FORMAT, ROWS, COLUMNS, GROUP, NATIVE, BLOCK_K, STAGES,
            )  # fmt: skip
        else:
            for i in tl.static_range(2):
                own = perm + (e.to(tl.int64) * 2 + i) * COLUMNS
                acc = product(
                    x, token, valid, matrix, channel, inside & (half == i), 0, tl.cdiv(COLUMNS, BLOCK_K),
                    data, scales, zeros, own, acc,
                    FORMAT, ROWS, COLUMNS, GROUP, NATIVE, BLOCK_K, STAGES,
                )  # fmt: skip
        both = acc.to(x.dtype.element_ty).to(tl.float32)
        gate, up = both.reshape(CHANNELS // 8, 2, 8, BLOCK_T).permute(0, 2, 3, 1).split()
        gate, up = gate.reshape(CHANNELS, BLOCK_T), up.reshape(CHANNELS, BLOCK_T)
        weight = tl.load(weights + pair, mask=valid, other=0.0)
        value = clamped_swiglu(gate, up, limit) * weight[None, :]
        channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        at = activations + pair.to(tl.int64)[None, :] * ROWS + channel[:, None]
        tl.store(at, value.to(x.dtype.element_ty), mask=valid[None, :] & (channel < ROWS)[:, None])


@triton.jit
def clamped_swiglu(gate, up, limit):
    """`ops/swiglu.py` of fp32 values."""
    if limit is not None:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["pairs", "first", "start", "stop"])
def _down(
    activations, outputs, width, start, stop, ids, order, starts, first, pairs, data, scales, zeros, perm,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, TOPK: tl.constexpr, NATIVE: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """outputs[pair] = w2 activations[pair], a tile of columns start..stop-1."""
    e, begin, end = _chunk(ids, order, starts, first, pairs, EXPERTS, BLOCK_E, BLOCK_P, BLOCK_T)
    if e < EXPERTS:
        pair, valid = _members(ids, order, first, pairs, e, begin, end, BLOCK_P, BLOCK_T)
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = start + r < stop
        matrix = e.to(tl.int64) + tl.zeros((BLOCK_R,), tl.int64)
        if perm is not None:
            perm += e.to(tl.int64) * COLUMNS
        acc = product(
            activations, pair.to(tl.int64), valid, matrix, start + r, inside, 0, tl.cdiv(COLUMNS, BLOCK_K),
            data, scales, zeros, perm,
            tl.zeros((BLOCK_R, BLOCK_T), tl.float32), FORMAT, ROWS, COLUMNS, GROUP, NATIVE, BLOCK_K, STAGES,
        )  # fmt: skip
        at = outputs + pair.to(tl.int64)[None, :] * width + r[:, None]
        tl.store(at, acc.to(outputs.dtype.element_ty), mask=valid[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["first", "start", "stop", "num_tokens"])
def _sum(
    outputs, width, start, stop, ids, first, out, num_tokens,
    EXPERTS: tl.constexpr, TOPK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[token] = the sum of its experts' outputs in the order of `ids`, columns start..stop-1."""
    t = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    h = start + tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (t < num_tokens)[:, None] & (h < stop)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for k in range(TOPK):
        expert = tl.load(ids + t * TOPK + k, mask=t < num_tokens, other=0) - first
        held = (expert >= 0) & (expert < EXPERTS)
        row = outputs + (t * TOPK + k) * width - start
        acc += tl.load(row[:, None] + h[None, :], mask=inside & held[:, None], other=0.0).to(tl.float32)
    tl.store(out + t[:, None] * HIDDEN + h[None, :], acc, mask=inside)
