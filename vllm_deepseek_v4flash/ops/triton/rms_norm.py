from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Strided, block, launch, strided

_TILE = 2048  # values of one program, or one row where that is more


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    dim, out = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = strided(x.reshape(-1, dim))
    num_rows = rows.data.shape[0]
    block_d = block(dim)
    block_n = max(1, _TILE // block_d)
    launch(
        _rms_norm, (triton.cdiv(num_rows, block_n),),
        rows, None if weight is None else weight.contiguous(), out, num_rows, eps,
        DIM=dim, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=min(16, max(4, block_d // 1024)),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(x: Strided, weight, out, num_rows, eps, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < num_rows) & (d < DIM)
    y = tl.load(x.data + n * x.stride + d, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    # y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y * tl.rsqrt(tl.sum(y * y, axis=1) / DIM + eps)[:, None]
    # out = weight * y
    if weight is not None:
        y = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32) * y  # [1, BLOCK_D]
    tl.store(out + n * DIM + d, y.to(out.dtype.element_ty), mask=mask)  # [BLOCK_N, BLOCK_D]
