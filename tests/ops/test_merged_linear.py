"""Several linears of one input, whose weights are stored as one."""

import pytest
import torch

from testing.ops.numeric import U32, assert_exact, assert_within, f64, integers, normal
from vllm_deepseek_v4flash.ops.merged_linear import merged_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "inner"), [(1, 1), (5, 96), (3, 257), (70, 40), (0, 8)])
def test_each_part_has_its_dtype_and_is_rounded_once(device, rng, dtype, tokens, inner):
    x = normal(rng, tokens, inner, dtype=dtype, device=device)
    sizes, dtypes = (7, 1, 130, 64), (dtype, torch.float32, dtype, torch.float32)
    weight = normal(rng, sum(sizes), inner, dtype=dtype, device=device)
    results = merged_linear(x, weight, sizes, dtypes)
    assert [result.dtype for result in results] == list(dtypes)
    for rows, result in zip(weight.split(sizes), results, strict=True):
        expected = f64(x) @ f64(rows).T
        assert_within(result, expected, inner * U32 * f64(x).abs() @ f64(rows).abs().T)


def test_the_weight_may_be_wider_than_x(device, rng):
    x, weight = normal(rng, 3, 16, dtype=torch.bfloat16, device=device), normal(rng, 4, 16, device=device)
    (result,) = merged_linear(x, weight, [4], [torch.float32])
    assert_within(result, f64(x) @ f64(weight).T, 16 * U32 * f64(x).abs() @ f64(weight).abs().T)


def test_the_weight_may_be_narrower_than_x(device, rng):
    x, weight = normal(rng, 3, 16, device=device), normal(rng, 4, 16, dtype=torch.bfloat16, device=device)
    for result in merged_linear(x, weight, [1, 3], [torch.float32] * 2):
        assert result.dtype == torch.float32
    assert_within(
        torch.cat(merged_linear(x, weight, [1, 3], [torch.float32] * 2), dim=1),
        f64(x) @ f64(weight).T,
        16 * U32 * f64(x).abs() @ f64(weight).abs().T,
    )


def test_any_number_of_parts(device, rng):
    x, sizes = integers(rng, -8, 8, 6, 32, device=device), list(range(19))
    weight = integers(rng, -8, 8, sum(sizes), 32, device=device)
    results = merged_linear(x, weight, sizes, [torch.float32] * 19)
    for rows, result in zip(weight.split(sizes), results, strict=True):
        assert_exact(result, (f64(x) @ f64(rows).T).float())


def test_strided_operands(device, rng):
    x, weight = integers(rng, -8, 8, 5, 48, device=device)[:, 3:35], integers(rng, -8, 8, 32, 9, device=device).T
    results = merged_linear(x, weight, [4, 5], [torch.float32] * 2)
    assert_exact(torch.cat(results, dim=1), (f64(x) @ f64(weight).T).float())


def test_wrong_arguments_are_named(device):
    x, weight = torch.zeros(2, 4, device=device), torch.zeros(5, 4, device=device)
    with pytest.raises(ValueError, match=r"weight must have shape \[6, 4\], got \[5, 4\]"):
        merged_linear(x, weight, [3, 3], [torch.float32] * 2)
    with pytest.raises(ValueError, match=r"weight must have shape \[5, 3\], got \[5, 4\]"):
        merged_linear(x[:, :3], weight, [3, 2], [torch.float32] * 2)
    with pytest.raises(ValueError, match="sizes has 2 parts, dtypes 1: every part needs a dtype"):
        merged_linear(x, weight, [3, 2], [torch.float32])
