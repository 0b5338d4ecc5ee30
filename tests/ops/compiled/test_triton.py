"""Triton kernels: no findings, the same bits in every order of warps and blocks, and the result is the oracle's."""

import pytest

from testing.ops import compiled as cases
from testing.ptxrun.verify import verified

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("execute", "case"),
    [
        pytest.param(arch, case, id=f"sm_{arch}-{name}", marks=() if arch in ordinary else SLOW)
        for name, (case, *ordinary) in cases.CASES.items()
        for arch in (80, 90)
    ],
    indirect=["execute"],
)
def test_against_the_oracle(execute, rng, case):
    made = case(rng)
    actual, _ = verified(made.compute, execute, made.schedules)
    made.check(actual)
