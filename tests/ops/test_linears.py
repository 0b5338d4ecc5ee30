"""Several linears of one input."""

import pytest
import torch

from testing.ops.numeric import U32, assert_exact, assert_within, f64, integers, normal
from vllm_deepseek_v4flash.ops.linears import linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "inner"), [(1, 1), (5, 96), (3, 257), (70, 40), (0, 8)])
def test_each_result_has_its_dtype_and_is_rounded_once(device, rng, dtype, tokens, inner):
    x = normal(rng, tokens, inner, dtype=dtype, device=device)
    dtypes = [dtype, torch.float32, dtype, torch.float32]
    weights = [normal(rng, rows, inner, dtype=dtype, device=device) for rows in (7, 1, 130, 64)]
    results = linears(x, weights, dtypes)
    assert [result.dtype for result in results] == dtypes
    for weight, result in zip(weights, results, strict=True):
        expected = f64(x) @ f64(weight).T
        assert_within(result, expected, inner * U32 * f64(x).abs() @ f64(weight).abs().T)


def test_weights_may_be_wider_than_x(device, rng):
    x, weight = normal(rng, 3, 16, dtype=torch.bfloat16, device=device), normal(rng, 4, 16, device=device)
    (result,) = linears(x, [weight], [torch.float32])
    assert_within(result, f64(x) @ f64(weight).T, 16 * U32 * f64(x).abs() @ f64(weight).abs().T)


def test_any_number_of_weights(device, rng):
    x = integers(rng, -8, 8, 6, 32, device=device)
    weights = [integers(rng, -8, 8, rows, 32, device=device) for rows in range(19)]
    for weight, result in zip(weights, linears(x, weights, [torch.float32] * 19), strict=True):
        assert_exact(result, (f64(x) @ f64(weight).T).float())


def test_strided_operands(device, rng):
    x, weight = integers(rng, -8, 8, 5, 48, device=device)[:, 3:35], integers(rng, -8, 8, 32, 9, device=device).T
    assert_exact(linears(x, [weight], [torch.float32])[0], (f64(x) @ f64(weight).T).float())


def test_wrong_arguments_are_named(device):
    x = torch.zeros(2, 4, device=device)
    with pytest.raises(ValueError, match=r"weights\[1\] must have shape \[\*, 4\], got \[5, 3\]"):
        linears(x, [torch.zeros(5, 4, device=device), torch.zeros(5, 3, device=device)], [torch.float32] * 2)
    with pytest.raises(ValueError, match="1 weights need as many dtypes, got 2"):
        linears(x, [torch.zeros(5, 4, device=device)], [torch.float32] * 2)
