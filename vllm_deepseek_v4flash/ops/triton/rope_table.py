from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import block, launch

_TILE = 1024  # angles of one program


def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    num_tokens, half = positions.shape[0], inv_freq.shape[0]
    out = torch.empty((num_tokens, 2 * half), dtype=torch.float32, device=positions.device)
    block_r = block(half)
    block_t = max(1, _TILE // block_r)
    launch(
        _rope_table, (triton.cdiv(num_tokens, block_t),),
        positions.contiguous(), inv_freq.contiguous(), out, num_tokens,
        HALF=half, BLOCK_T=block_t, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_table(positions, inv_freq, out, num_tokens, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    position = tl.load(positions + t, mask=t < num_tokens, other=0).to(tl.float32)  # [BLOCK_T]
    freq = tl.load(inv_freq + r, mask=r < HALF, other=0.0)  # [BLOCK_R]
    # angle = positions[:, None] * inv_freq; out = torch.cat((angle.cos(), angle.sin()), -1)
    cos, sin = cos_sin(position[:, None] * freq[None, :])
    at = out + t[:, None] * (2 * HALF) + r[None, :]
    mask = (t < num_tokens)[:, None] & (r < HALF)[None, :]
    tl.store(at, cos, mask=mask)  # [BLOCK_T, BLOCK_R]
    tl.store(at + HALF, sin, mask=mask)  # [BLOCK_T, BLOCK_R]


@triton.jit
def cos_sin(angle):
    """cos and sin of fp32 angles below 2^30, to within 2^-22; (1, 0) for zero.

    Triton's own are fast approximations, wrong for angles of many turns.
    """
    quarters = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)  # 2 / pi
    r = (angle.to(tl.float64) - quarters * 1.5707963267948966).to(tl.float32)
    # Taylor series: the first terms left out are below 2^-25 for |r| <= pi / 4.
    s = r * r
    sin = r + r * s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880))))
    cos = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320))))
    quarter = quarters.to(tl.int32) & 3
    even = quarter % 2 == 0
    cos, sin = tl.where(even, cos, sin), tl.where(even, sin, cos)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)
