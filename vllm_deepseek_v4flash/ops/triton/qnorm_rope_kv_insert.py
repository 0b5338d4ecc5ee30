from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..rows import PagedRows
from .launch import Pointer, Strided, block, device_of, launch
from .rope import load_rotary, rotate
from .rows import Rows, layout_of, rows_of, store_rows

_TILE = 2048  # values of one program


class Queries(NamedTuple):
    """[T, H, D]; strides in elements."""

    data: Pointer
    token_stride: int
    head_stride: int


def qnorm_rope_kv_insert(
    q: torch.Tensor, kv: torch.Tensor, cos_sin: torch.Tensor, window: PagedRows, slots: torch.Tensor, *, eps: float
) -> torch.Tensor:
    num_tokens, heads, _ = q.shape
    rope, out = cos_sin.shape[1], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    layout = layout_of(window, device_of(q).native_fp8)
    block_h = min(block(heads), max(1, _TILE // layout.block))
    # The last program of a token stores its kv row, the others take its heads.
    launch(
        _qnorm_rope_kv_insert, (num_tokens, triton.cdiv(heads, block_h) + 1),
        Queries(q, q.stride(0), q.stride(1)), Strided(kv, kv.stride(0)), cos_sin.contiguous(), out,
        rows_of(window)._replace(table=None, table_stride=None), slots, heads, eps,
        LAYOUT=layout, ROPE=rope, BLOCK_H=block_h, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _qnorm_rope_kv_insert(
    q: Queries, kv: Strided, cos_sin, out, window: Rows, slots, heads, eps,
    LAYOUT: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = LAYOUT.dim
    BLOCK_D: tl.constexpr = LAYOUT.block
    t, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)[None, :]
    cos, sin = load_rotary(cos_sin, t, d, DIM, ROPE, False)
    dtype = q.data.dtype.element_ty
    if group == tl.num_programs(1) - 1:
        slot = tl.load(slots + t)
        if slot >= 0:
            # window[slot] = apply_rope(kv, cos_sin)
            x = tl.load(kv.data + t * kv.stride + d, mask=d < DIM, other=0.0).to(tl.float32)  # [1, BLOCK_D]
            x = rotate(x, cos, sin, 1, BLOCK_D).to(dtype).to(tl.float32)
            page = slot // LAYOUT.rows + tl.zeros((1,), tl.int64)
            row = (slot % LAYOUT.rows).to(tl.int32) + tl.zeros((1,), tl.int32)
            store_rows(x, window, page, row, row >= 0, LAYOUT, 1)
    else:
        # out = apply_rope(rms_norm(q, None, eps), cos_sin)
        h = group * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        mask = (h < heads) & (d < DIM)
        at = q.data + t * q.token_stride + h.to(tl.int64) * q.head_stride + d
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
        x = x * tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x = rotate(x.to(dtype).to(tl.float32), cos, sin, BLOCK_H, BLOCK_D)
        tl.store(out + (t * heads + h) * DIM + d, x.to(dtype), mask=mask)  # [BLOCK_H, BLOCK_D]
