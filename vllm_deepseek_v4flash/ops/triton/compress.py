from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rows import PagedRows
from .launch import block, device_of, launch
from .rope_table import cos_sin
from .rows import format_constants, locate, row_args, store_rows

_TILE = 8192  # values of a window's rows that one program holds at a time


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
    constants = format_constants(entries.format)
    dim, block_d = entries.format.dim, constants["BLOCK_D"]
    kv, gate = (x if x.stride(1) == 1 else x.contiguous() for x in (kv, gate))
    span = ratio * channels // dim
    tile = min(block(span), max(1, _TILE // block_d))
    launch(
        _compress, (num_tokens,),
        kv, kv.stride(0), gate, gate.stride(0), ape.contiguous(), norm_weight.contiguous(), inv_freq.contiguous(),
        positions.contiguous(), request.contiguous(), *row_args(states), state_slots.contiguous(), *row_args(entries),
        eps,
        RATIO=ratio, SPAN=span, C=channels, BLOCK_C=block(channels), TILE=tile, ROPE=2 * inv_freq.shape[0],
        STATE_ROWS=states.rows_per_page, ROWS=entries.rows_per_page, LOG2_DIM=dim.bit_length() - 1,
        NATIVE=device_of(kv).native_fp8, DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), **constants,
        num_warps=min(8, max(1, tile * block_d // 1024)),
    )  # fmt: skip


@triton.jit
def _compress(
    kv, kv_stride, gate, gate_stride, ape, norm_weight, inv_freq,
    positions, request, states, state_stride, state_table, state_table_stride, slots,
    entries, entry_stride, entry_table, entry_table_stride, eps,
    RATIO: tl.constexpr, SPAN: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, STATE_ROWS: tl.constexpr, ROWS: tl.constexpr, LOG2_DIM: tl.constexpr, NATIVE: tl.constexpr,
    DTYPE: tl.constexpr, CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr, DATA: tl.constexpr,
    SCALES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    if slot >= 0:
        position = tl.load(positions + t)
        c = tl.arange(0, BLOCK_C)
        values = tl.load(kv + t * kv_stride + c, mask=c < C)
        weights = tl.load(gate + t * gate_stride + c, mask=c < C)
        weights += tl.load(ape + position % RATIO * C + c, mask=c < C)
        state = states + slot // STATE_ROWS * state_stride + slot % STATE_ROWS * (2 * C)
        tl.store(state + c, values, mask=c < C)
        tl.store(state + C + c, weights, mask=c < C)
        if position % RATIO == RATIO - 1:
            owner = tl.load(request + t)
            pooled = _pool(
                kv, kv_stride, gate, gate_stride, ape, positions, request,
                states, state_stride, state_table, state_table_stride, slots, t, position, owner,
                RATIO, SPAN, C, TILE, STATE_ROWS, DIM, BLOCK_D,
            )  # fmt: skip
            d = tl.arange(0, BLOCK_D)[None, :]
            x = pooled.to(DTYPE).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + eps)
            x = tl.load(norm_weight + d, mask=d < DIM, other=0.0).to(tl.float32) * x
            x = _rotate(x.to(DTYPE).to(tl.float32), position - (RATIO - 1), inv_freq, DIM, ROPE, BLOCK_D)
            one = tl.zeros((1,), tl.int32)
            page, row = locate(entry_table, entry_table_stride, owner + one, position // RATIO, one == 0, ROWS)
            store_rows(
                x.to(DTYPE).to(tl.float32), entries, entry_stride, page, row.to(tl.int32) + one, one == 0,
                1, ROWS, CODEC, DIM, QUANTISED, DATA, SCALES, BLOCK_D, LOG2_DIM, NATIVE,
            )  # fmt: skip


@triton.jit
def _pool(
    kv, kv_stride, gate, gate_stride, ape, positions, request,
    states, state_stride, state_table, state_table_stride, slots, t, position, owner,
    RATIO: tl.constexpr, SPAN: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, STATE_ROWS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gated sum [1, BLOCK_D] of the window that token `t` completes, the same however its tokens were batched."""
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
        here = here & (tl.load(request + near, mask=here, other=0) == owner)
        here = here & (tl.load(positions + near, mask=here, other=0) == token)
        here = here & (tl.load(slots + near, mask=here, other=-1) >= 0)
        page, row = locate(state_table, state_table_stride, owner, token, exists & (here == 0), STATE_ROWS)
        state = states + page * state_stride + row * (2 * C)
        # With overlap the first RATIO rows are the previous window's, which go through their first half.
        at = (j // RATIO * (C - DIM))[:, None] + d
        mask = exists[:, None] & (d < DIM)
        # Chosen between whole tiles of addresses, because Triton forgets the alignment of chosen columns of them.
        inside = here[:, None]
        x = tl.where(inside, (kv + near * kv_stride)[:, None] + at, state[:, None] + at)
        x = tl.load(x, mask=mask, other=0.0)
        g = tl.where(inside, (gate + near * gate_stride)[:, None] + at, (state + C)[:, None] + at)
        g = tl.load(g, mask=mask, other=-float("inf"))
        g += tl.load(ape + (token % RATIO)[:, None] * C + at, mask=mask & inside, other=0.0)
        higher = tl.maximum(top, tl.max(g, axis=0, keep_dims=True))
        weights, shrink = tl.exp(g - higher), tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, axis=0, keep_dims=True)
        acc = acc * shrink + tl.sum(weights * x, axis=0, keep_dims=True)
        top = higher
    return acc / tl.where(d < DIM, total, 1.0)


@triton.jit
def _rotate(x, position, inv_freq, DIM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [1, BLOCK_D] fp32 with its last ROPE of DIM dimensions rotated by fp32 angles position * inv_freq."""
    k = tl.arange(0, BLOCK_D // 2) - (DIM - ROPE) // 2
    angle = position.to(tl.float32) * tl.load(inv_freq + k, mask=(k >= 0) & (k < ROPE // 2), other=0.0)
    cos, sin = cos_sin(angle)
    even, odd = x.reshape(BLOCK_D // 2, 2).split()
    return tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(1, BLOCK_D)
