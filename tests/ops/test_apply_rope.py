"""Rotary embedding: interleaved pairs, last dimensions, both directions (docs/model.md, "RoPE")."""

import math

import pytest
import torch

from testing.ops.numeric import FUNCTION, U32, U, assert_exact, assert_within, f64, normal
from vllm_deepseek_v4flash.ops.apply_rope import apply_rope


def table(positions, inv_freq, device):
    """[T, R] fp32, cosines then sines."""
    rows = [[f(p * w) for f in (math.cos, math.sin) for w in inv_freq] for p in positions]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(positions), -1).to(device)


def oracle(x, positions, inv_freq, inverse):
    """Rotation of a complex number per pair."""
    out, first = f64(x).clone(), x.shape[-1] - 2 * len(inv_freq)
    for t, position in enumerate(positions):
        for k, w in enumerate(inv_freq):
            turn = complex(math.cos(position * w), math.sin(position * w))
            pair = out[t, ..., first + 2 * k : first + 2 * k + 2].view(-1, 2)
            for head in range(pair.shape[0]):
                z = complex(*pair[head].tolist()) * (turn.conjugate() if inverse else turn)
                pair[head] = torch.tensor([z.real, z.imag], dtype=torch.float64)
    return out


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 12), (4, 3, 12), (4, 1, 6)], ids=str)
def test_rotates_pairs_of_the_last_dimensions(device, rng, inverse, dtype, shape):
    positions, inv_freq = [0, 1, 130, 77], [1.0, 0.3, 0.011]
    x = normal(rng, *shape, device=device, dtype=dtype)
    actual = apply_rope(x, table(positions, inv_freq, device), inverse=inverse)
    assert actual.dtype == dtype
    first = shape[-1] - 6
    assert_exact(actual[..., :first], x[..., :first])
    # cos and sin are rounded, then come two products and a sum: four roundings of at most |x_2k| + |x_2k+1|.
    pairs = f64(x)[..., first:].unflatten(-1, (-1, 2)).abs().sum(-1).repeat_interleave(2, -1)
    expected = oracle(x, positions, inv_freq, inverse)
    assert_within(actual[..., first:], expected[..., first:], 4 * U32 * pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverse_restores(device, rng, dtype):
    x = normal(rng, 5, 2, 20, device=device, dtype=dtype)
    cos_sin = table([3, 1000, 65536, 7, 0], [1.0, 0.5, 0.01, 1e-4], device)
    back = apply_rope(apply_rope(x, cos_sin), cos_sin, inverse=True)
    # Both rotations round once; an error of a pair is at most its length times that.
    bound = torch.full(x.shape, 0.0, dtype=torch.float64)
    bound[..., 12:] = f64(x)[..., 12:].unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    assert_within(back, f64(x), 2 * (U[dtype] * 2**0.5 + FUNCTION) * bound)


def test_input_is_left_alone(device, rng):
    x = normal(rng, 2, 8, device=device)
    before = x.clone()
    apply_rope(x, table([5, 6], [1.0, 0.1], device))
    assert_exact(x, before)


def test_strided_heads_and_no_tokens(device, rng):
    wide = normal(rng, 3, 2, 24, device=device)
    cos_sin = table([1, 2, 3], [1.0, 0.1], device)
    assert_exact(apply_rope(wide[..., 4:16], cos_sin), apply_rope(wide[..., 4:16].contiguous(), cos_sin))
    assert apply_rope(wide[:0], cos_sin[:0]).shape == (0, 2, 24)


@pytest.mark.parametrize(
    ("cos_sin", "message"),
    [
        pytest.param(torch.zeros(3, 4), r"cos_sin must have shape \[2, \*\], got \[3, 4\]", id="tokens"),
        pytest.param(torch.zeros(2, 4).half(), "cos_sin must be torch.float32, got torch.float16", id="dtype"),
        pytest.param(torch.zeros(2, 10), "cannot rotate 10 of 8 dimensions", id="too-wide"),
        pytest.param(torch.zeros(2, 3), "cannot rotate 3 of 8", id="odd"),
    ],
)
def test_wrong_table_is_named(device, cos_sin, message):
    with pytest.raises(ValueError, match=message):
        apply_rope(torch.zeros(2, 8, device=device), cos_sin.to(device))
