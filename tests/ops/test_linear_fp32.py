"""The linear that is not rounded (docs/model.md, "Kept in fp32")."""

import pytest
import torch

from testing.ops.numeric import U32, assert_exact, assert_within, f64, integers, normal
from vllm_deepseek_v4flash.ops.linear_fp32 import linear_fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(1, 1, 1), (5, 96, 7), (3, 257, 24), (0, 8, 4)])
def test_result_is_fp32(device, rng, dtype, tokens, inner, outer):
    x, weight = (
        normal(rng, tokens, inner, dtype=dtype, device=device),
        normal(rng, outer, inner, dtype=dtype, device=device),
    )
    expected = torch.tensor(
        [
            [sum(a * b for a, b in zip(row, column, strict=True)) for column in f64(weight).tolist()]
            for row in f64(x).tolist()
        ],
        dtype=torch.float64,
    ).view(tokens, outer)
    actual = linear_fp32(x, weight)
    assert actual.dtype == torch.float32
    assert_within(actual, expected, inner * U32 * f64(x).abs() @ f64(weight).abs().T)


def test_bits_that_bf16_would_lose_survive(device, rng):
    x = integers(rng, -64, 64, 4, 32, device=device, dtype=torch.bfloat16)
    weight = integers(rng, -64, 64, 6, 32, device=device, dtype=torch.bfloat16)
    expected = (f64(x) @ f64(weight).T).float()
    assert not torch.equal(expected, expected.to(torch.bfloat16).float())
    assert_exact(linear_fp32(x, weight), expected)


def test_weight_may_be_wider_than_x(device, rng):
    x, weight = normal(rng, 3, 16, dtype=torch.bfloat16, device=device), normal(rng, 4, 16, device=device)
    assert_within(linear_fp32(x, weight), f64(x) @ f64(weight).T, 16 * U32 * f64(x).abs() @ f64(weight).abs().T)


def test_wrong_weight_is_named(device):
    with pytest.raises(ValueError, match=r"weight must have shape \[\*, 4\], got \[5, 3\]"):
        linear_fp32(torch.zeros(2, 4, device=device), torch.zeros(5, 3, device=device))
