"""SwiGLU with the asymmetric clamp (docs/model.md, "Mixture of experts")."""

import math

import pytest
import torch

from testing.ops.numeric import FUNCTION, U32, assert_within, f64, normal
from vllm_deepseek_v4flash.ops.swiglu import swiglu


def oracle(gate, up, limit):
    out = []
    for g, u in zip(f64(gate).flatten().tolist(), f64(up).flatten().tolist(), strict=True):
        if limit is not None:
            g, u = min(g, limit), max(-limit, min(u, limit))
        out.append(g / (1 + math.exp(-g)) * u)
    return torch.tensor(out, dtype=torch.float64).view(gate.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 10.0, 0.7])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (5, 33), (2, 3, 8), (0, 8), (131, 8), (2, 1100)])
def test_matches_the_formula_in_fp32(device, rng, dtype, limit, shape):
    gate, up = (normal(rng, *shape, scale=6, device=device, dtype=dtype) for _ in range(2))
    actual = swiglu(gate, up, limit)
    assert actual.dtype == torch.float32
    expected = oracle(gate, up, limit)
    # exp of x errs by |x| * U32 more than by its own ulp where it is computed through exp2; |x| < 30 here.
    assert_within(actual, expected, (FUNCTION + 30 * U32) * expected.abs())


def test_gate_is_clamped_from_above_only(device):
    gate = torch.tensor([-3.0, 3.0, -3.0, 3.0, 0.5], device=device)
    up = torch.tensor([3.0, -3.0, -0.5, 0.5, 1.0], device=device)
    silu = [g / (1 + math.exp(-g)) for g in (-3.0, 1.0, -3.0, 1.0, 0.5)]
    expected = [a * b for a, b in zip(silu, (1.0, -1.0, -0.5, 0.5, 1.0), strict=True)]
    assert swiglu(gate, up, 1.0).tolist() == pytest.approx(expected, rel=FUNCTION)


def test_halves_of_one_tensor(device, rng):
    """As a fused gate and up projection leaves them."""
    both = normal(rng, 3, 2, 40, device=device)
    gate, up = both[..., :20], both[..., 20:]
    expected = oracle(gate, up, 0.5)
    assert_within(swiglu(gate, up, 0.5), expected, (FUNCTION + 30 * U32) * expected.abs())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("limit", [None, 10.0])
def test_nan_and_infinities_are_not_hidden(device, limit):
    gate = torch.tensor([math.nan, 1.0, -math.inf, math.inf, -200.0], device=device)
    up = torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0], device=device)
    actual = swiglu(gate, up, limit).cpu()
    assert actual[:2].isnan().all()
    # silu(-inf) is -inf * 0.
    assert actual[2].isnan()
    silu = math.inf if limit is None else 10 / (1 + math.exp(-10))
    assert actual[3:].tolist() == pytest.approx([silu, 0.0], rel=FUNCTION, abs=1e-30)


def test_wrong_up_is_named(device):
    with pytest.raises(ValueError, match=r"up must have shape \[2, 4\], got \[2, 3\]"):
        swiglu(torch.zeros(2, 4, device=device), torch.zeros(2, 3, device=device), None)
