from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..rows import PagedRows
from .launch import Pointer, Strided, block, device_of, launch, strided
from .rope_table import cos_sin
from .rows import Rows, layout_of, locate, rows_of, store_rows

_TILE = 8192  # values of a window's rows that one program holds at a time


class Tokens(NamedTuple):
    """This step's tokens."""

    kv: Strided
    """[T, C] fp32"""
    gate: Strided
    """[T, C] fp32"""
    positions: Pointer
    request: Pointer
    slots: Pointer
    """[T] int64, of their states; negative for padding"""


class Plan(NamedTuple):
    """What the kernel is compiled for."""

    ratio: int
    """Tokens of a window."""
    span: int
    """Tokens that an entry pools: two windows if they overlap."""
    channels: int
    block_c: int
    """The power of two that holds `channels`."""
    tile: int
    """Tokens that are pooled at a time."""
    rope: int
    state_rows: int
    """States of a page."""
    dtype: Any


def compress(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    inv_freq: torch.Tensor,
    positions: torch.Tensor,
    request: torch.Tensor,
    states: PagedRows,
    state_slots: torch.Tensor,
    entries: PagedRows,
    *,
    ratio: int,
    eps: float,
    dtype: torch.dtype,
) -> None:
    num_tokens, channels = kv.shape
    layout = layout_of(entries, device_of(kv).native_fp8)
    span = ratio * channels // layout.dim
    tile = min(block(span), max(1, _TILE // layout.block))
    tokens = Tokens(strided(kv), strided(gate), positions.contiguous(), request.contiguous(), state_slots.contiguous())
    plan = Plan(
        ratio, span, channels, block(channels), tile, 2 * inv_freq.shape[0], states.rows_per_page,
        getattr(tl, str(dtype).removeprefix("torch.")),
    )  # fmt: skip
    launch(
        _compress, (num_tokens,),
        tokens, ape.contiguous(), norm_weight.contiguous(), inv_freq.contiguous(), rows_of(states), rows_of(entries),
        eps, PLAN=plan, LAYOUT=layout, num_warps=min(8, max(1, tile * layout.block // 1024)),
    )  # fmt: skip


@triton.jit
def _compress(
    tokens: Tokens, ape, norm_weight, inv_freq, states: Rows, entries: Rows, eps,
    PLAN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    RATIO: tl.constexpr = PLAN.ratio
    C: tl.constexpr = PLAN.channels
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(tokens.slots + t)
    if slot >= 0:
        # states[slot] = torch.cat((kv, gate + ape[position % ratio]))
        position = tl.load(tokens.positions + t)
        c = tl.arange(0, PLAN.block_c)
        values = tl.load(tokens.kv.data + t * tokens.kv.stride + c, mask=c < C)  # [BLOCK_C]
        weights = tl.load(tokens.gate.data + t * tokens.gate.stride + c, mask=c < C)  # [BLOCK_C]
        weights += tl.load(ape + position % RATIO * C + c, mask=c < C)  # [BLOCK_C]
        state = states.pages + slot // PLAN.state_rows * states.page_stride + slot % PLAN.state_rows * (2 * C)
        tl.store(state + c, values, mask=c < C)  # [BLOCK_C]
        tl.store(state + C + c, weights, mask=c < C)  # [BLOCK_C]
        if position % RATIO == RATIO - 1:
            owner = tl.load(tokens.request + t)
            pooled = _pool(tokens, ape, states, t, position, owner, PLAN, LAYOUT)
            x = _finish(pooled, norm_weight, inv_freq, position - (RATIO - 1), eps, PLAN, LAYOUT)
            # entries[request, position // ratio] = x
            one = tl.zeros((1,), tl.int32)
            ROWS: tl.constexpr = LAYOUT.rows
            page, row = locate(entries, owner + one, position // RATIO, one == 0, ROWS)
            store_rows(x, entries, page, row.to(tl.int32) + one, one == 0, LAYOUT, 1)


@triton.jit
def _pool(tokens: Tokens, ape, states: Rows, t, position, owner, PLAN: tl.constexpr, LAYOUT: tl.constexpr):
    """The gated sum [1, BLOCK_D] of the window that token `t` completes, the same however its tokens were batched."""
    C: tl.constexpr = PLAN.channels
    SPAN: tl.constexpr = PLAN.span
    TILE: tl.constexpr = PLAN.tile
    STATE_ROWS: tl.constexpr = PLAN.state_rows
    BLOCK_D: tl.constexpr = LAYOUT.block
    d = tl.arange(0, BLOCK_D)[None, :]
    # Finite, so that a tile without rows leaves it as it is instead of NaN.
    top = tl.full((1, BLOCK_D), -3.0e38, tl.float32)
    total, acc = tl.zeros((1, BLOCK_D), tl.float32), tl.zeros((1, BLOCK_D), tl.float32)
    for first in range(0, SPAN, TILE):
        j = first + tl.arange(0, TILE)
        token, near = position - (SPAN - 1) + j, t - (SPAN - 1) + j
        exists = (j < SPAN) & (token >= 0)
        # This step's rows come from its inputs: other programs are writing their states.
        here = exists & (near >= 0)
        here = here & (tl.load(tokens.request + near, mask=here, other=0) == owner)  # [TILE]
        here = here & (tl.load(tokens.positions + near, mask=here, other=0) == token)  # [TILE]
        here = here & (tl.load(tokens.slots + near, mask=here, other=-1) >= 0)  # [TILE]
        page, row = locate(states, owner, token, exists & (here == 0), STATE_ROWS)
        state = states.pages + page * states.page_stride + row * (2 * C)
        # With overlap the first RATIO rows are the previous window's, which go through their first half.
        at = (j // PLAN.ratio * (C - LAYOUT.dim))[:, None] + d
        mask = exists[:, None] & (d < LAYOUT.dim)
        # Chosen between whole tiles of addresses, because Triton forgets the alignment of chosen columns of them.
        inside = here[:, None]
        x = tl.where(inside, (tokens.kv.data + near * tokens.kv.stride)[:, None] + at, state[:, None] + at)
        x = tl.load(x, mask=mask, other=0.0)  # [TILE, BLOCK_D]
        g = tl.where(inside, (tokens.gate.data + near * tokens.gate.stride)[:, None] + at, (state + C)[:, None] + at)
        g = tl.load(g, mask=mask, other=-float("inf"))  # [TILE, BLOCK_D]
        bias = ape + (token % PLAN.ratio)[:, None] * C + at
        g += tl.load(bias, mask=mask & inside, other=0.0)  # [TILE, BLOCK_D]
        # acc = (gate.softmax(0) * kv).sum(0), over the tiles so far
        higher = tl.maximum(top, tl.max(g, axis=0, keep_dims=True))
        weights, shrink = tl.exp(g - higher), tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, axis=0, keep_dims=True)
        acc = acc * shrink + tl.sum(weights * x, axis=0, keep_dims=True)
        top = higher
    return acc / tl.where(d < LAYOUT.dim, total, 1.0)


@triton.jit
def _finish(pooled, norm_weight, inv_freq, position, eps, PLAN: tl.constexpr, LAYOUT: tl.constexpr):
    """apply_rope(rms_norm(pooled.to(dtype), norm_weight, eps), rope_table(position, inv_freq)) [1, BLOCK_D] fp32."""
    DTYPE: tl.constexpr = PLAN.dtype
    DIM: tl.constexpr = LAYOUT.dim
    ROPE: tl.constexpr = PLAN.rope
    BLOCK_D: tl.constexpr = LAYOUT.block
    d = tl.arange(0, BLOCK_D)[None, :]
    x = pooled.to(DTYPE).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + eps)
    x = tl.load(norm_weight + d, mask=d < DIM, other=0.0).to(tl.float32) * x  # [1, BLOCK_D]
    x = _rotate(x.to(DTYPE).to(tl.float32), position, inv_freq, DIM, ROPE, BLOCK_D)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _rotate(x, position, inv_freq, DIM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [1, BLOCK_D] fp32 with its last ROPE of DIM dimensions rotated by fp32 angles position * inv_freq."""
    k = tl.arange(0, BLOCK_D // 2) - (DIM - ROPE) // 2
    freq = tl.load(inv_freq + k, mask=(k >= 0) & (k < ROPE // 2), other=0.0)  # [BLOCK_D // 2]
    cos, sin = cos_sin(position.to(tl.float32) * freq)
    even, odd = x.reshape(BLOCK_D // 2, 2).split()
    return tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(1, BLOCK_D)
