"""The kernels' rotation against `apply_rope`."""

import pytest
import torch
import triton
import triton.language as tl

from testing.ops.numeric import U32, assert_within, f64, normal
from vllm_deepseek_v4flash.ops.apply_rope import apply_rope
from vllm_deepseek_v4flash.ops.triton.rope import load_rotary, rotate

TOKENS, HEADS = 3, 4


@triton.jit
def _rotate(
    x, cos_sin, out, N: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    t, d = tl.program_id(0), tl.arange(0, BLOCK_D)[None, :]
    at = (t * N + tl.arange(0, N)[:, None]) * DIM + d
    cos, sin = load_rotary(cos_sin, t, d, DIM, ROPE, INVERSE)
    value = tl.load(x + at, mask=d < DIM, other=0.0)
    tl.store(out + at, rotate(value, cos, sin, N, BLOCK_D), mask=d < DIM)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("dim", "rope"), [(16, 16), (12, 6), (48, 8), (20, 0)])
def test_equals_apply_rope(device, rng, dim, rope, inverse):
    x = normal(rng, TOKENS, HEADS, dim, device=device)
    angles = normal(rng, TOKENS, rope // 2, scale=10, device=device)
    cos_sin, out = torch.cat((angles.cos(), angles.sin()), -1), torch.empty_like(x)
    _rotate[(TOKENS,)](
        x, cos_sin, out, N=HEADS, DIM=dim, ROPE=rope, BLOCK_D=triton.next_power_of_2(dim), INVERSE=inverse
    )
    expected = apply_rope(x, cos_sin, inverse=inverse) if rope else x
    # Two products and a sum, and the same again in the op; a GPU fuses one of the three.
    pairs = f64(x).unflatten(-1, (-1, 2)).abs().sum(-1).repeat_interleave(2, -1)
    pairs[..., : dim - rope] = 0
    assert_within(out, f64(expected), 6 * U32 * pairs)
    assert torch.equal(out[..., : dim - rope], x[..., : dim - rope])
