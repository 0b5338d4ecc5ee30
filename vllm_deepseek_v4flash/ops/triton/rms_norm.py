from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import block, launch

_TILE = 2048  # values of one program, or one row where that is more


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    dim, out = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, dim)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    block_d = block(dim)
    block_n = max(1, _TILE // block_d)
    launch(
        _rms_norm, (triton.cdiv(rows.shape[0], block_n),),
        rows, rows.stride(0), None if weight is None else weight.contiguous(), out, rows.shape[0], eps,
        DIM=dim, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=min(16, max(4, block_d // 1024)),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(x, stride, weight, out, num_rows, eps, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < num_rows) & (d < DIM)
    y = tl.load(x + n * stride + d, mask=mask, other=0.0).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, axis=1) / DIM + eps)[:, None]
    if weight is not None:
        y = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32) * y
    tl.store(out + n * DIM + d, y.to(out.dtype.element_ty), mask=mask)
