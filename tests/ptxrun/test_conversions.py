"""cvt, and mov between registers and vectors, against NumPy and PyTorch."""

import numpy as np
import pytest
import torch

from testing.ptxrun.snippets import dtype_of, floats, integers, lanewise, wrapped

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("to", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("from_", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_conversions(to, from_):
    a = integers(RNG, from_)
    out = lanewise(f"cvt.{to}.{from_}", to, [from_], [a], np.dtype(f"u{int(to[1:]) // 8}").type)
    np.testing.assert_array_equal(out, wrapped(a, to))
    info = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
    out = lanewise(f"cvt.sat.{to}.{from_}", to, [from_], [a], np.dtype(f"u{int(to[1:]) // 8}").type)
    np.testing.assert_array_equal(out, wrapped([min(max(int(x), info.min), info.max) for x in a], to))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["s32", "u32", "s64"])
@pytest.mark.parametrize(("mode", "of"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
def test_floats_to_integers(to, mode, of):
    a = np.concatenate((floats(RNG), RNG.standard_normal(64).astype(np.float32) * 100))
    out = lanewise(
        f"cvt.{mode}.{to}.f32", to, ["f32"], [a], np.dtype(f"{to[0].replace('s', 'i')}{int(to[1:]) // 8}").type
    )
    info = np.iinfo(out.dtype)
    missing = info.min if to == "s64" else 0
    expected = [missing if np.isnan(x) else min(max(int(of(x)), info.min), info.max) if np.isfinite(x) else
                (info.max if x > 0 else info.min) for x in a.astype(np.float64)]  # fmt: skip
    np.testing.assert_array_equal(out, np.array(expected, out.dtype))


def test_integers_to_floats():
    for type_ in ("s32", "u32", "s64"):
        a = integers(RNG, type_)
        np.testing.assert_array_equal(
            lanewise(f"cvt.rn.f32.{type_}", "f32", [type_], [a], np.float32), a.astype(np.float32)
        )


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_16_bit_floats(name, dtype):
    a = np.concatenate((floats(RNG), RNG.standard_normal(64).astype(np.float32)))
    out = lanewise(f"cvt.rn.{name}.f32", name, ["f32"], [a], np.uint16)
    found, expected = torch.from_numpy(out.view(np.int16)).view(dtype), torch.from_numpy(a).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    back = lanewise(f"cvt.f32.{name}", "f32", [name], [out], np.float32)
    torch.testing.assert_close(torch.from_numpy(back), expected.float(), rtol=0, atol=0, equal_nan=True)
    out = lanewise(f"cvt.rn.{name}x2.f32", "b32", ["f32", "f32"], [a, a[::-1].copy()], np.uint32)
    halves = torch.from_numpy(out.view(np.int16).reshape(-1, 2)).view(dtype)
    torch.testing.assert_close(halves[:, 1], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(halves[:, 0], expected.flip(0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
def test_16_bit_floats_towards_zero():
    a = np.concatenate((floats(RNG), RNG.standard_normal(64).astype(np.float32)))
    nearest = a.astype(np.float16)
    further = np.abs(nearest.astype(np.float64)) > np.abs(a.astype(np.float64))
    expected = np.where(further, np.nextafter(nearest, np.float16(0)), nearest)
    out = lanewise("cvt.rz.f16.f32", "f16", ["f32"], [a], np.uint16)
    np.testing.assert_array_equal(out.view(np.float16), expected)
    out = lanewise("cvt.rz.bf16.f32", "bf16", ["f32"], [a], np.uint16)
    expected = (a.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal((out.astype(np.uint32) << 16).view(np.float32), expected)


def test_e4m3():
    a = np.concatenate(
        (floats(RNG), RNG.standard_normal(192).astype(np.float32) * 10.0 ** RNG.integers(-3, 3, 192))
    ).astype(np.float32)
    out = lanewise("cvt.rn.satfinite.e4m3x2.f32", "e4m3x2", ["f32", "f32"], [a, a[::-1].copy()], np.uint16)
    found = torch.from_numpy(out.view(np.uint8).reshape(-1, 2)[:, 1].copy()).view(torch.float8_e4m3fn).float()
    expected = torch.from_numpy(a).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    codes = np.arange(256, dtype=np.uint16)
    halves = lanewise("cvt.rn.f16x2.e4m3x2", "f16x2", ["e4m3x2"], [codes], np.uint32)
    found = torch.from_numpy(halves.astype(np.uint16).view(np.int16)).view(torch.float16).float()
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_doubles():
    a = floats(RNG)
    wide = lanewise("cvt.f64.f32", "f64", ["f32"], [a], np.float64)
    np.testing.assert_array_equal(wide, a.astype(np.float64))
    back = lanewise("cvt.rn.f32.f64", "f32", ["f64"], [wide * (1 + 2**-30)], np.float32)
    np.testing.assert_array_equal(back, (wide * (1 + 2**-30)).astype(np.float32))
    finite = np.where(np.isfinite(wide), wide, 0.5)
    np.testing.assert_array_equal(lanewise("cvt.rmi.f64.f64", "f64", ["f64"], [finite], np.float64), np.floor(finite))
    for opcode, of in {"add.f64": np.add, "sub.f64": np.subtract, "mul.f64": np.multiply}.items():
        out = lanewise(opcode, "f64", ["f64", "f64"], [finite, finite[::-1].copy()], np.float64)
        np.testing.assert_array_equal(out, of(finite, finite[::-1]))


def test_tf32_ties_go_away_from_zero():
    bits = np.array([0x3F800FFF, 0x3F801000, 0xBF801000, 0x3F802FFF, 0x7F800000] * 8, np.uint32)
    out = lanewise("cvt.rna.tf32.f32", "b32", ["f32"], [bits.view(np.float32)], np.uint32)
    assert out[:5].tolist() == [0x3F800000, 0x3F802000, 0xBF802000, 0x3F802000, 0x7F800000]


@pytest.mark.parametrize(("part", "whole", "count"), [("b16", "b32", 2), ("b32", "b64", 2), ("b16", "b64", 4)])
def test_registers_are_packed_lowest_part_first(part, whole, count):
    parts = [integers(RNG, "u" + part[1:]) for _ in range(count)]
    items = ", ".join(f"%x{i}" for i in range(count))
    dtype = dtype_of("u" + whole[1:])
    # The instruction's own operands are a comment: the harness writes them one by one.
    packed = lanewise(f"mov.{whole} %d, {{{items}}};\n//", whole, [part] * count, parts, dtype)
    np.testing.assert_array_equal(packed.view(f"u{int(part[1:]) // 8}").reshape(-1, count), np.stack(parts, 1))
    for i in range(count):
        items = ", ".join("%d" if j == i else "_" for j in range(count))
        out = lanewise(f"mov.{whole} {{{items}}}, %x0;\n//", part, [whole], [packed], parts[0].dtype)
        np.testing.assert_array_equal(out, parts[i])
