"""A block-diagonal linear (docs/model.md, "Attention")."""

import pytest
import torch

from testing.ops.numeric import U32, assert_exact, assert_within, f64, integers, normal
from vllm_deepseek_v4flash.ops.grouped_linear import grouped_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "groups", "inner", "rows"), [(1, 1, 1, 1), (5, 3, 96, 7), (70, 2, 33, 24)])
def test_each_group_is_multiplied_by_its_own_rows(device, rng, dtype, tokens, groups, inner, rows):
    x = normal(rng, tokens, groups, inner, dtype=dtype, device=device)
    weight = normal(rng, groups * rows, inner, dtype=dtype, device=device)
    actual = grouped_linear(x, weight)
    assert actual.dtype == dtype
    assert actual.shape == (tokens, groups, rows)
    for group in range(groups):
        own = f64(weight)[group * rows : (group + 1) * rows]
        bound = inner * U32 * f64(x)[:, group].abs() @ own.abs().T
        assert_within(actual[:, group], f64(x)[:, group] @ own.T, bound)


def test_the_weight_may_be_narrower_than_x(device, rng):
    x = integers(rng, -8, 8, 5, 2, 32, device=device)
    weight = integers(rng, -8, 8, 6, 32, device=device)
    assert_exact(grouped_linear(x, weight.bfloat16()), grouped_linear(x, weight))


def test_strided_inputs_and_no_tokens(device, rng):
    wide = integers(rng, -8, 8, 4, 2, 40, device=device)
    weight = integers(rng, -8, 8, 6, 32, device=device)
    assert_exact(grouped_linear(wide[..., 3:35], weight), grouped_linear(wide[..., 3:35].contiguous(), weight))
    assert grouped_linear(wide[:0, :, :32], weight).shape == (0, 2, 3)


def test_wrong_weights_are_named(device):
    x = torch.zeros(2, 3, 4, device=device)
    with pytest.raises(ValueError, match=r"weight must have shape \[\*, 4\], got \[6, 5\]"):
        grouped_linear(x, torch.zeros(6, 5, device=device))
    with pytest.raises(ValueError, match="x has 3 groups, which do not divide the weight's 7 rows"):
        grouped_linear(x, torch.zeros(7, 4, device=device))
