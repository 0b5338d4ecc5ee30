"""RMSNorm: fp32 with the weight inside, one rounding (docs/model.md, "RMSNorm")."""

import pytest
import torch

from testing.ops.numeric import FUNCTION, U32, assert_within, f64, normal
from vllm_deepseek_v4flash.ops.rms_norm import rms_norm


def oracle(x, weight, eps):
    rows = []
    for row in f64(x).flatten(0, -2):
        y = row / (sum(v * v for v in row.tolist()) / len(row) + eps) ** 0.5
        rows.append(y if weight is None else y * f64(weight))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (3, 4, 96), (2, 512), (37, 100)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_matches_the_formula_with_a_single_rounding(device, rng, dtype, weighted, shape, eps):
    x = normal(rng, *shape, device=device, dtype=dtype)
    weight = normal(rng, shape[-1], device=device, dtype=dtype) if weighted else None
    expected = oracle(x, weight, eps)
    # The sum of squares errs by dim * U32 relatively, its root by half; two products follow. In 16 bits this leaves no
    # room for a second rounding, which would show in many of the values.
    assert_within(rms_norm(x, weight, eps), expected, (shape[-1] * U32 + FUNCTION) * expected.abs())


def test_fp32_weight_keeps_its_bits_on_a_bf16_input(device, rng):
    x = normal(rng, 4, 32, device=device, dtype=torch.bfloat16)
    weight = 1 + normal(rng, 32, scale=2.0**-8, device=device)
    expected = oracle(x, weight, 1e-6)
    assert_within(rms_norm(x, weight, 1e-6), expected, (32 * U32 + FUNCTION) * expected.abs())


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda x: x[:, 0, :48], id="rows"),
        pytest.param(lambda x: x[::2, :, 3:51], id="tokens"),
        pytest.param(lambda x: x[:, :, :96:2], id="values"),
    ],
)
def test_rows_and_values_may_be_strided(device, rng, part):
    x, weight = part(normal(rng, 6, 2, 100, device=device)), normal(rng, 96, device=device)[::2]
    assert not x.is_contiguous()
    expected = oracle(x, weight, 1e-6)
    assert_within(rms_norm(x, weight, 1e-6), expected, (48 * U32 + FUNCTION) * expected.abs())


def test_squares_do_not_overflow_in_16_bits(device):
    x = torch.full((1, 8), 3e4, dtype=torch.float16, device=device)
    assert rms_norm(x, None, 1e-6).cpu().tolist() == [[1.0] * 8]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_nan_stays_in_its_row(device):
    x = torch.ones(3, 8, device=device)
    x[1, 5] = torch.nan
    assert rms_norm(x, None, 0.0).isnan().all(-1).tolist() == [False, True, False]


def test_zeros_and_no_tokens(device):
    assert not rms_norm(torch.zeros(2, 8, device=device), None, 1e-6).any()
    assert rms_norm(torch.zeros(0, 8, device=device), torch.ones(8, device=device), 1e-6).shape == (0, 8)


def test_wrong_weight_is_named(device):
    with pytest.raises(ValueError, match=r"weight must have shape \[8\], got \[7\]"):
        rms_norm(torch.zeros(2, 8, device=device), torch.ones(7, device=device), 1e-6)
