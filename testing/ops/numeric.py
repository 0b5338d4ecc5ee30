"""Error bounds in units of rounding, for oracles that compute in fp64.

A sum of n fp32 products in any order errs by at most n * U32 * sum |a_i b_i|, and a value rounded once to a dtype by
U[dtype] * |value|: that is where the bounds in these tests come from.
"""

from __future__ import annotations

import torch

U32 = 2.0**-24
U = {torch.float64: 2.0**-53, torch.float32: U32, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Half the smallest subnormal, which is what rounding costs near zero.
TINY = {torch.float64: 0.0, torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
# exp, log, sin, cos, rsqrt and division on any device: within 4 ulp.
FUNCTION = 8 * U32


def normal(
    rng: torch.Generator,
    *shape: int,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    return (torch.randn(shape, generator=rng) * scale).to(device=device, dtype=dtype)


def integers(
    rng: torch.Generator,
    low: int,
    high: int,
    *shape: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Whole numbers low..high as floats: their sums and products are exact in any order."""
    return torch.randint(low, high + 1, shape, generator=rng).to(device=device, dtype=dtype)


def f64(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", torch.float64)


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    """`actual` is `expected` (fp64) to within `bound` plus the one rounding to the dtype of `actual`."""
    assert tuple(actual.shape) == tuple(expected.shape)
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(expected.shape)
    bound = bound + U[actual.dtype] * (expected.abs() + bound) + TINY[actual.dtype]
    error = (f64(actual) - expected).abs()
    wrong = ~(error <= bound)
    if wrong.any():
        worst = int((error - bound).nan_to_num(torch.inf).argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values are off, worst at {where}: "
            f"{f64(actual)[where]} for {expected[where]}, allowed {bound[where]}"
        )


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same shape, same dtype, same values; NaN equals NaN."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)
