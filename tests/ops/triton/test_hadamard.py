"""The kernels' Hadamard transform is the op's, bit for bit: queries and keys are transformed by different ones."""

import pytest
import torch
import triton
import triton.language as tl

from testing.ops.numeric import normal
from vllm_deepseek_v4flash.ops.hadamard import hadamard as op
from vllm_deepseek_v4flash.ops.triton.hadamard import hadamard


@triton.jit
def _hadamard(x, out, N: tl.constexpr, DIM: tl.constexpr):
    at = tl.arange(0, N)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(out + at, hadamard(tl.load(x + at), N, DIM))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dim", [2, 32, 64, 128])
def test_equals_the_op(device, rng, rows, dim):
    x = normal(rng, rows, dim, device=device)
    out = torch.empty_like(x)
    _hadamard[(1,)](x, out, N=rows, DIM=dim)
    assert torch.equal(out, op(x))
