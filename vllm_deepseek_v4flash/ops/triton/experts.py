"""The routed experts in three launches: gate and up with the activation, down, and the sum over a token's experts.

A pair is a token and one of its experts, numbered as in `topk_ids`. A program of the products takes a chunk of the
pairs of one expert and reads a tile of that expert's weights, once. With few pairs every program finds its chunk by
looking through `topk_ids`; with many, an earlier launch sorts them by expert.

Nothing here depends on values that the host would have to read, and every sum has a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Pointer, Strided, block, device_of, launch
from .packed_weights import InputRows, StoredWeight, Weight, WeightRows, pairable, product, tile_for
from .swiglu import clamped_swiglu

_SCANNED = 256  # pairs that a program looks through by itself
_SORTED = 1024  # pairs that a program of the sort takes in at a time
_WORKSPACE = 1 << 27  # bytes of the experts' outputs that wait for their sum
_SUMMED = 1024  # values that one program sums


class Routing(NamedTuple):
    """The pairs; sorted if there are many, otherwise `order` and `starts` are None."""

    ids: Pointer
    """[pairs], each pair's expert"""
    order: Pointer | None
    """[pairs] int32, the pairs by expert"""
    starts: Pointer | None
    """[experts + 1] int32, where each expert's begin in `order`"""


class Experts(NamedTuple):
    """What the kernels of the products are compiled for."""

    count: int
    """Experts that this rank holds."""
    topk: int
    block_e: int
    """The power of two that holds `count`."""
    block_p: int
    """The power of two that holds all pairs, if every program looks through them."""


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
    block_k, word, tile, options = tile_for(x.dtype, pairs / num_experts)
    chunks, routing = _route(ids, num_experts, first_expert, tile.block_t)
    experts = Experts(num_experts, topk, block(num_experts), 1 if routing.order is not None else block(pairs, 64))
    native = device_of(x).native_fp8
    weight13, form13 = w13.fitted(block_k, word, native)
    weight2, form2 = w2.fitted(block_k, word, native)
    if weight13.perm is not None or (routing.order is not None and tile.block_t == 16):
        options["maxnreg"] = 255  # or ptxas makes do with 80, and spills
    launch(
        _gate_up, (triton.cdiv(inner, tile.block_r // 2), chunks),
        x, activations, topk_weights.contiguous(), swiglu_limit, routing, first_expert, pairs, weight13,
        EXPERTS=experts, FORM=form13, TILE=tile, **options,
    )  # fmt: skip
    width = min(hidden, max(_WORKSPACE // max(1, pairs * x.element_size()) // 1024, 1) * 1024)
    outputs = Strided(torch.empty((pairs, width), dtype=x.dtype, device=x.device), width)
    block_h = min(block(hidden), _SUMMED)
    block_n = _SUMMED // block_h
    for start in range(0, hidden, width):
        stop = min(start + width, hidden)
        launch(
            _down, (triton.cdiv(stop - start, tile.block_r), chunks),
            activations, outputs, start, stop, routing, first_expert, pairs, weight2,
            EXPERTS=experts, FORM=form2, TILE=tile, **options,
        )  # fmt: skip
        launch(
            _sum, (triton.cdiv(num_tokens, block_n), triton.cdiv(stop - start, block_h)),
            outputs, start, stop, ids, first_expert, out, num_tokens,
            COUNT=num_experts, TOPK=topk, HIDDEN=hidden, BLOCK_N=block_n, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
    return out


def _route(ids: torch.Tensor, num_experts: int, first: int, size: int) -> tuple[int, Routing]:
    """How many chunks of `size` pairs there are at most; the pairs, sorted if there are many."""
    pairs = ids.numel()
    if pairs <= _SCANNED:
        return pairs, Routing(ids, None, None)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    launch(_sort, (num_experts,), ids, order, starts, pairs, num_experts, first, BLOCK=_SORTED, num_warps=4)
    return min(pairs, triton.cdiv(pairs, size) + num_experts), Routing(ids, order, starts)


@triton.jit(do_not_specialize=["pairs", "first"])
def _sort(ids, order, starts, pairs, num_experts, first, BLOCK: tl.constexpr):
    """One expert's pairs, ascending, after those of the experts before it."""
    e = tl.program_id(0)
    # starts[e] = ((ids >= first) & (ids < first + e)).sum()
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        expert = tl.load(ids + p, mask=p < pairs, other=0) - first  # [BLOCK]
        before += ((expert >= 0) & (expert < e) & (p < pairs)).to(tl.int32)
    at = tl.sum(before)
    tl.store(starts + e, at)
    # order[starts[e] : starts[e + 1]] = (ids == first + e).nonzero()
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        mine = (tl.load(ids + p, mask=p < pairs, other=0) - first == e) & (p < pairs)  # [BLOCK]
        rank = tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(order + at + rank, p, mask=mine)  # [BLOCK]
        at += tl.sum(mine.to(tl.int32))
    if e == num_experts - 1:
        tl.store(starts + num_experts, at)


@triton.jit
def _chunk(routing: Routing, first, pairs, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """This program's expert (EXPERTS.count: there is nothing to do), where its pairs begin, its expert's end.

    They are numbered within the expert, or as in `routing.order` if there is one.
    """
    if routing.order is None:
        p, q = tl.program_id(1), tl.arange(0, EXPERTS.block_p)
        expert = tl.load(routing.ids + p) - first
        earlier = (tl.load(routing.ids + q, mask=q < p, other=0) - first == expert) & (q < p)  # [BLOCK_P]
        begin = tl.sum(earlier.to(tl.int32))
        end = pairs
        # The pair that would begin a chunk takes it.
        working = (expert >= 0) & (expert < EXPERTS.count) & (begin % BLOCK_T == 0)
        e = tl.where(working, expert, EXPERTS.count).to(tl.int32)
    else:
        c, n = tl.program_id(1), tl.arange(0, EXPERTS.block_e)
        start = tl.load(routing.starts + n, mask=n < EXPERTS.count, other=0)  # [BLOCK_E]
        stop = tl.load(routing.starts + n + 1, mask=n < EXPERTS.count, other=0)  # [BLOCK_E]
        chunks = (stop - start + BLOCK_T - 1) // BLOCK_T
        # Experts whose chunks have all begun before this one; those beyond the last have none, and end with it.
        e = tl.minimum(tl.sum((tl.cumsum(chunks) <= c).to(tl.int32)), EXPERTS.count)
        begin = tl.sum(tl.where(n == e, start, 0)) + (c - tl.sum(tl.where(n < e, chunks, 0))) * BLOCK_T
        end = tl.sum(tl.where(n == e, stop, 0))
    return e, begin, end


@triton.jit
def _members(routing: Routing, first, pairs, e, begin, end, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """The pairs [BLOCK_T] int32 of a chunk, and which of them exist."""
    wanted = begin + tl.arange(0, BLOCK_T)
    if routing.order is None:
        q = tl.arange(0, BLOCK_P)
        same = (tl.load(routing.ids + q, mask=q < pairs, other=0) - first == e) & (q < pairs)  # [BLOCK_P]
        rank = tl.cumsum(same.to(tl.int32)) - 1
        hit = (same[None, :] & (rank[None, :] == wanted[:, None])).to(tl.int32)
        pair, valid = tl.sum(hit * q[None, :], axis=1), tl.sum(hit, axis=1) > 0
    else:
        valid = wanted < end
        pair = tl.load(routing.order + wanted, mask=valid, other=0)  # [BLOCK_T]
    return pair, valid


@triton.jit(do_not_specialize=["pairs", "first"])
def _gate_up(
    x, activations, weights, limit, routing: Routing, first, pairs, weight: Weight,
    EXPERTS: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """activations[pair] = weight * swiglu(w1 x, w3 x), for a tile of channels."""
    BLOCK_R: tl.constexpr = TILE.block_r
    BLOCK_T: tl.constexpr = TILE.block_t
    STAGES: tl.constexpr = TILE.stages
    BLOCK_P: tl.constexpr = EXPERTS.block_p
    COLUMNS: tl.constexpr = FORM.columns
    BLOCK_K: tl.constexpr = FORM.block_k
    e, begin, end = _chunk(routing, first, pairs, EXPERTS, BLOCK_T)
    if e < EXPERTS.count:
        pair, valid = _members(routing, first, pairs, e, begin, end, BLOCK_P, BLOCK_T)
        CHANNELS: tl.constexpr = BLOCK_R // 2
        # Eight rows of w1, then the same of w3, and so on: a thread of an mma instruction holds rows i and i + 8.
        r = tl.arange(0, BLOCK_R)
        half = r // 8 % 2
        channel = tl.program_id(0) * CHANNELS + r // 16 * 8 + r % 8
        inside = channel < FORM.rows
        matrix = e.to(tl.int64) * 2 + half
        token = (pair // EXPERTS.topk).to(tl.int64)
        # gate, up = x[token] @ w1[e].T, x[token] @ w3[e].T
        acc = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
        if weight.perm is None:
            acc = product(
                x, InputRows(token, valid), weight, None, WeightRows(matrix, channel, inside),
                0, tl.cdiv(COLUMNS, BLOCK_K), acc, FORM, STAGES,
            )  # fmt: skip
        else:
            for i in tl.static_range(2):
                own = weight.perm + (e.to(tl.int64) * 2 + i) * COLUMNS
                acc = product(
                    x, InputRows(token, valid), weight, own, WeightRows(matrix, channel, inside & (half == i)),
                    0, tl.cdiv(COLUMNS, BLOCK_K), acc, FORM, STAGES,
                )  # fmt: skip
        both = acc.to(x.dtype.element_ty).to(tl.float32)
        gate, up = both.reshape(CHANNELS // 8, 2, 8, BLOCK_T).permute(0, 2, 3, 1).split()
        gate, up = gate.reshape(CHANNELS, BLOCK_T), up.reshape(CHANNELS, BLOCK_T)
        # activations[pair] = swiglu(gate, up, limit) * topk_weights[pair]
        router = tl.load(weights + pair, mask=valid, other=0.0)  # [BLOCK_T]
        value = clamped_swiglu(gate, up, limit) * router[None, :]
        channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        at = activations + pair.to(tl.int64)[None, :] * FORM.rows + channel[:, None]
        mask = valid[None, :] & (channel < FORM.rows)[:, None]
        tl.store(at, value.to(x.dtype.element_ty), mask=mask)  # [CHANNELS, BLOCK_T]


@triton.jit(do_not_specialize=["pairs", "first", "start", "stop"])
def _down(
    activations, outputs: Strided, start, stop, routing: Routing, first, pairs, weight: Weight,
    EXPERTS: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """outputs[pair] = w2 activations[pair], a tile of columns start..stop-1."""
    BLOCK_R: tl.constexpr = TILE.block_r
    BLOCK_T: tl.constexpr = TILE.block_t
    STAGES: tl.constexpr = TILE.stages
    BLOCK_P: tl.constexpr = EXPERTS.block_p
    COLUMNS: tl.constexpr = FORM.columns
    BLOCK_K: tl.constexpr = FORM.block_k
    e, begin, end = _chunk(routing, first, pairs, EXPERTS, BLOCK_T)
    if e < EXPERTS.count:
        pair, valid = _members(routing, first, pairs, e, begin, end, BLOCK_P, BLOCK_T)
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = start + r < stop
        matrix = e.to(tl.int64) + tl.zeros((BLOCK_R,), tl.int64)
        perm = weight.perm
        if perm is not None:
            perm += e.to(tl.int64) * COLUMNS
        # outputs[pair] = activations[pair] @ w2[e, start:stop].T
        acc = product(
            activations, InputRows(pair.to(tl.int64), valid), weight, perm, WeightRows(matrix, start + r, inside),
            0, tl.cdiv(COLUMNS, BLOCK_K), tl.zeros((BLOCK_R, BLOCK_T), tl.float32), FORM, STAGES,
        )  # fmt: skip
        at = outputs.data + pair.to(tl.int64)[None, :] * outputs.stride + r[:, None]
        mask = valid[None, :] & inside[:, None]
        tl.store(at, acc.to(outputs.data.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_T]


@triton.jit(do_not_specialize=["first", "start", "stop", "num_tokens"])
def _sum(
    outputs: Strided, start, stop, ids, first, out, num_tokens,
    COUNT: tl.constexpr, TOPK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[token] = the sum of its experts' outputs in the order of `ids`, columns start..stop-1."""
    t = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    h = start + tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (t < num_tokens)[:, None] & (h < stop)[None, :]
    # out[:, h] = outputs.unflatten(0, (T, topk)).sum(1), of the experts that this rank holds
    acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for k in range(TOPK):
        expert = tl.load(ids + t * TOPK + k, mask=t < num_tokens, other=0) - first  # [BLOCK_N]
        held = (expert >= 0) & (expert < COUNT)
        at = (outputs.data + (t * TOPK + k) * outputs.stride - start)[:, None] + h[None, :]
        acc += tl.load(at, mask=inside & held[:, None], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_H]
    tl.store(out + t[:, None] * HIDDEN + h[None, :], acc, mask=inside)  # [BLOCK_N, BLOCK_H]
