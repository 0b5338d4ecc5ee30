from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rows import PagedRows
from .launch import block, device_of, launch
from .rope import load_rotary, rotate
from .rows import format_constants, row_args, store_rows

_TILE = 2048  # values of one program


def qnorm_rope_kv_insert(
    q: torch.Tensor, kv: torch.Tensor, cos_sin: torch.Tensor, window: PagedRows, slots: torch.Tensor, *, eps: float
) -> torch.Tensor:
    num_tokens, heads, dim = q.shape
    rope, out = cos_sin.shape[1], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pages, page_stride, _, _ = row_args(window)
    block_d = block(dim, format_constants(window.format)["BLOCK_D"])
    block_h = min(block(heads), max(1, _TILE // block_d))
    # The last program of a token stores its kv row, the others take its heads.
    launch(
        _qnorm_rope_kv_insert, (num_tokens, triton.cdiv(heads, block_h) + 1),
        q, q.stride(0), q.stride(1), kv, kv.stride(0), cos_sin.contiguous(), out, pages, page_stride, slots, heads, eps,
        ROPE=rope, ROWS=window.rows_per_page, BLOCK_H=block_h, LOG2_DIM=dim.bit_length() - 1,
        NATIVE=device_of(q).native_fp8, **format_constants(window.format) | {"BLOCK_D": block_d}, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _qnorm_rope_kv_insert(
    q, q_stride, head_stride, kv, kv_stride, cos_sin, out, pages, page_stride, slots, heads, eps,
    ROPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, LOG2_DIM: tl.constexpr, NATIVE: tl.constexpr,
    CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr, DATA: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    t, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)[None, :]
    cos, sin = load_rotary(cos_sin, t, d, DIM, ROPE, False)
    dtype = q.dtype.element_ty
    if group == tl.num_programs(1) - 1:
        slot = tl.load(slots + t)
        if slot >= 0:
            x = tl.load(kv + t * kv_stride + d, mask=d < DIM, other=0.0).to(tl.float32)
            x = rotate(x, cos, sin, 1, BLOCK_D).to(dtype).to(tl.float32)
            page, row = slot // ROWS + tl.zeros((1,), tl.int64), (slot % ROWS).to(tl.int32) + tl.zeros((1,), tl.int32)
            store_rows(
                x, pages, page_stride, page, row, row >= 0,
                1, ROWS, CODEC, DIM, QUANTISED, DATA, SCALES, BLOCK_D, LOG2_DIM, NATIVE,
            )  # fmt: skip
    else:
        h = group * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        mask = (h < heads) & (d < DIM)
        x = tl.load(q + t * q_stride + h.to(tl.int64) * head_stride + d, mask=mask, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x = rotate(x.to(dtype).to(tl.float32), cos, sin, BLOCK_H, BLOCK_D)
        tl.store(out + (t * heads + h) * DIM + d, x.to(dtype), mask=mask)
