from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Strided, block, launch, strided

_TILE = 1024  # values of one program


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    dim, out = gate.shape[-1], torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
    gate_rows, up_rows = strided(gate.reshape(-1, dim)), strided(up.reshape(-1, dim))
    num_rows = gate_rows.data.shape[0]
    block_d = min(_TILE, block(dim))
    block_n = _TILE // block_d
    launch(
        _swiglu, (triton.cdiv(num_rows, block_n), triton.cdiv(dim, block_d)),
        gate_rows, up_rows, out, num_rows, dim, limit, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu(gate: Strided, up: Strided, out, num_rows, dim, limit, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (n < num_rows) & (d < dim)
    g = tl.load(gate.data + n * gate.stride + d, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    u = tl.load(up.data + n * up.stride + d, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    # out = silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    tl.store(out + n * dim + d, clamped_swiglu(g, u, limit), mask=mask)  # [BLOCK_N, BLOCK_D]


@triton.jit
def clamped_swiglu(gate, up, limit):
    """`ops/swiglu.py` of fp32 values; `limit` may be None."""
    if limit is not None:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1 + tl.exp(-gate)) * up
