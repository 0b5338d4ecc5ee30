from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import block, launch

_TILE = 1024  # values of one program


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    dim, out = gate.shape[-1], torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
    gate, up = (
        rows if rows.stride(1) == 1 else rows.contiguous() for rows in (gate.reshape(-1, dim), up.reshape(-1, dim))
    )
    block_d = min(_TILE, block(dim))
    block_n = _TILE // block_d
    launch(
        _swiglu, (triton.cdiv(gate.shape[0], block_n), triton.cdiv(dim, block_d)),
        gate, gate.stride(0), up, up.stride(0), out, gate.shape[0], dim, limit,
        BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu(gate, gate_stride, up, up_stride, out, num_rows, dim, limit, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (n < num_rows) & (d < dim)
    g = tl.load(gate + n * gate_stride + d, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + n * up_stride + d, mask=mask, other=0.0).to(tl.float32)
    if limit is not None:
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + n * dim + d, g / (1 + tl.exp(-g)) * u, mask=mask)
