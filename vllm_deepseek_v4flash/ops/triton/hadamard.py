"""The Hadamard transform inside kernels: the same additions in the same order as `ops/hadamard.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def hadamard(x, N: tl.constexpr, DIM: tl.constexpr):
    """[N, DIM] fp32 to the same, orthonormal; DIM is a power of two."""
    LEVELS: tl.constexpr = _log2(DIM)
    for level in tl.static_range(LEVELS):
        # a, b = x.unflatten(-1, (-1, 2, 2**level)).unbind(-2); x = torch.stack((a + b, a - b), -2).flatten(-3)
        pairs = x.reshape(N, DIM // (2 << level), 2, 1 << level).permute(0, 1, 3, 2)
        a, b = pairs.split()
        x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(N, DIM)
    return x * (1.0 / DIM**0.5)
