"""Floating-point arithmetic against NumPy and PyTorch: equal bits, approximate functions correctly rounded."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from testing.ptxrun.snippets import floats, lanewise

RNG = np.random.default_rng(0)


@pytest.mark.filterwarnings("ignore")
def test_floats():
    a, b, c = floats(RNG), RNG.permutation(floats(RNG)), RNG.permutation(floats(RNG))
    cases = {
        "add.f32": a + b, "sub.f32": a - b, "mul.f32": a * b, "div.rn.f32": a / b, "div.full.f32": a / b,
        "min.f32": np.fmin(a, b), "max.f32": np.fmax(a, b), "max.NaN.f32": np.maximum(a, b),
        "min.NaN.f32": np.minimum(a, b),
    }  # fmt: skip
    for opcode, expected in cases.items():
        out = lanewise(opcode, "f32", ["f32", "f32"], [a, b], np.float32)
        np.testing.assert_array_equal(out, expected, err_msg=opcode)
    out = lanewise("fma.rn.f32", "f32", ["f32"] * 3, [a, b, c], np.float32)
    exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    np.testing.assert_array_equal(out, exact.astype(np.float32))
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "ex2.approx.f32": np.exp2, "lg2.approx.f32": np.log2, "rcp.approx.f32": lambda x: 1 / x,
        "rcp.rn.f32": lambda x: 1 / x, "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x), "sqrt.rn.f32": np.sqrt,
        "sqrt.approx.f32": np.sqrt, "abs.f32": np.abs, "neg.f32": np.negative, "tanh.approx.f32": np.tanh,
        "sin.approx.f32": np.sin, "cos.approx.f32": np.cos,
    }  # fmt: skip
    for opcode, of in functions.items():
        out = lanewise(opcode, "f32", ["f32"], [a], np.float32)
        np.testing.assert_array_equal(out, of(a.astype(np.float64)).astype(np.float32), err_msg=opcode)


def test_flush_to_zero():
    a = np.array([1e-40, -1e-40, 2.0, -200.0] * 8, np.float32)
    out = lanewise("mul.ftz.f32", "f32", ["f32", "f32"], [a, np.ones_like(a)], np.float32)
    np.testing.assert_array_equal(out[:4], np.array([0.0, -0.0, 2.0, -200.0], np.float32))
    assert np.signbit(out[1])
    assert lanewise("ex2.approx.ftz.f32", "f32", ["f32"], [np.full(32, -127.5, np.float32)], np.float32)[0] == 0.0


def test_rounding_down():
    a = np.full(32, 1.0, np.float32)
    out = lanewise("fma.rm.f32", "f32", ["f32"] * 3, [a, a, np.full(32, 2.0**-30, np.float32) * -1], np.float32)
    assert out[0] == np.nextafter(np.float32(1), np.float32(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cmp", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_float_comparisons(cmp):
    a, b = floats(RNG), RNG.permutation(floats(RNG))
    unordered = np.isnan(a) | np.isnan(b)
    base = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    expected = (
        unordered if cmp == "nan" else ~unordered if cmp == "num"
        else base[cmp[:2]] | unordered if cmp.endswith("u") else base[cmp] & ~unordered
    )  # fmt: skip
    np.testing.assert_array_equal(lanewise(f"setp.{cmp}.f32", "pred", ["f32", "f32"], [a, b], np.uint32), expected)


PACKED: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "fma.rn": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize(("type_", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
@pytest.mark.parametrize("op", PACKED)
def test_two_16_bit_floats(op, type_, dtype):
    """Rounded once from the exact result, which doubles hold."""
    values = torch.from_numpy(RNG.standard_normal((3 if op == "fma.rn" else 2, 64, 2))).to(dtype)
    expected = PACKED[op](*values.double()).to(dtype)
    pairs = [v.view(torch.int16).numpy().view(np.uint32).reshape(-1) for v in values]
    out = lanewise(f"{op}.{type_}x2", "b32", ["b32"] * len(pairs), pairs, np.uint32)
    torch.testing.assert_close(
        torch.from_numpy(out.view(np.int16).reshape(-1, 2)).view(dtype), expected, rtol=0, atol=0
    )
    single = [v[:, 0].contiguous().view(torch.int16).numpy().view(np.uint16) for v in values]
    out = lanewise(f"{op}.{type_}", "b16", ["b16"] * len(single), single, np.uint16)
    torch.testing.assert_close(torch.from_numpy(out.view(np.int16)).view(dtype), expected[:, 0], rtol=0, atol=0)
