"""The Hadamard transform inside kernels: the same additions in the same order as `ops/hadamard.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard(x, N: tl.constexpr, DIM: tl.constexpr, LOG2_DIM: tl.constexpr):
    """[N, DIM] fp32 to the same, orthonormal."""
    for level in tl.static_range(LOG2_DIM):
        # Neighbours at distance 2^level, brought together in the last dimension.
        pairs = x.reshape(N, DIM // (2 << level), 2, 1 << level).permute(0, 1, 3, 2)
        a, b = pairs.split()
        x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(N, DIM)
    return x * (1.0 / DIM**0.5)
