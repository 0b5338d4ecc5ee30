"""The rotation of interleaved pairs inside kernels (docs/model.md, "RoPE")."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rotary(cos_sin, t, d, DIM: tl.constexpr, ROPE: tl.constexpr, INVERSE: tl.constexpr):
    """For dimensions `d` of token `t`: the factors (fp32, the shape of `d`) of a value and of its pair's other value.

    (1, 0) outside the last ROPE of DIM dimensions, which are not rotated.
    """
    rotated = (d >= DIM - ROPE) & (d < DIM)
    pair = cos_sin + t.to(tl.int64) * ROPE + (d - (DIM - ROPE)) // 2
    cos = tl.load(pair, mask=rotated, other=1.0)  # the shape of d
    sin = tl.load(pair + ROPE // 2, mask=rotated, other=0.0)  # the shape of d
    return cos, tl.where((d % 2 == 0) != INVERSE, -sin, sin)


@triton.jit
def rotate(x, cos, sin, N: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [N, BLOCK_D] fp32 rotated by what `load_rotary` returned, [1 or N, BLOCK_D]."""
    even, odd = x.reshape(N, BLOCK_D // 2, 2).split()
    return x * cos + tl.join(odd, even).reshape(N, BLOCK_D) * sin
