"""Integer arithmetic, bits, comparisons, selection and predicates against NumPy and Python's integers."""

from collections.abc import Callable

import numpy as np
import pytest

from testing.ptxrun.snippets import integers, lanewise, wrapped

RNG = np.random.default_rng(0)


def trunc_div(a, b):
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "div": trunc_div, "rem": lambda a, b: a if b == 0 else a - b * trunc_div(a, b),
}  # fmt: skip


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("op", BINARY)
def test_integers(op, type_):
    a, b = integers(RNG, type_), integers(RNG, type_)[::-1].copy()
    out = lanewise(f"{op}.{type_}", type_, [type_, type_], [a, b], a.dtype.type)
    expected = wrapped([BINARY[op](int(x), int(y)) for x, y in zip(a, b, strict=True)], type_)
    np.testing.assert_array_equal(out.view(expected.dtype), expected)


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_products_high(type_):
    a, b = integers(RNG, type_), integers(RNG, type_)[::-1].copy()
    bits = int(type_[1:])
    out = lanewise(f"mul.hi.{type_}", type_, [type_, type_], [a, b], a.dtype.type)
    np.testing.assert_array_equal(
        out.view(f"u{bits // 8}"), wrapped([int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)], type_)
    )


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32"])
def test_wide_products(type_):
    wide = type_[0] + str(2 * int(type_[1:]))
    a, b, c = integers(RNG, type_), integers(RNG, type_)[::-1].copy(), integers(RNG, wide)
    out = lanewise(f"mul.wide.{type_}", wide, [type_, type_], [a, b], c.dtype.type)
    np.testing.assert_array_equal(
        wrapped(out, wide), wrapped([int(x) * int(y) for x, y in zip(a, b, strict=True)], wide)
    )
    out = lanewise(f"mad.wide.{type_}", wide, [type_, type_, wide], [a, b, c], c.dtype.type)
    expected = wrapped([int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)], wide)
    np.testing.assert_array_equal(wrapped(out, wide), expected)


@pytest.mark.parametrize("type_", ["b16", "b32", "b64"])
def test_bits(type_):
    a, b = integers(RNG, "u" + type_[1:]), integers(RNG, "u" + type_[1:])[::-1].copy()
    for op, of in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        np.testing.assert_array_equal(lanewise(f"{op}.{type_}", type_, [type_] * 2, [a, b], a.dtype.type), of(a, b))
    np.testing.assert_array_equal(lanewise(f"not.{type_}", type_, [type_], [a], a.dtype.type), ~a)


@pytest.mark.parametrize("type_", ["b16", "b32", "b64", "s32", "s64", "s16", "u32"])
def test_shifts(type_):
    a = integers(RNG, ("u" if type_[0] == "b" else type_[0]) + type_[1:])
    n = RNG.integers(0, 80, len(a)).astype(np.uint32)
    bits = int(type_[1:])
    if type_[0] == "b":
        out = lanewise(f"shl.{type_}", type_, [type_, "u32"], [a, n], a.dtype.type)
        np.testing.assert_array_equal(out, wrapped([int(x) << int(k) for x, k in zip(a, n, strict=True)], type_))
    out = lanewise(f"shr.{type_}", type_, [type_, "u32"], [a, n], a.dtype.type)
    expected = wrapped([int(x) >> min(int(k), bits) for x, k in zip(a, n, strict=True)], type_)
    np.testing.assert_array_equal(out.view(expected.dtype), expected)


@pytest.mark.parametrize("type_", ["u32", "s32"])
def test_bit_fields(type_):
    a = integers(RNG, type_)
    at, length = RNG.integers(0, 31, len(a)).astype(np.uint32), RNG.integers(0, 33, len(a)).astype(np.uint32)
    out = lanewise(f"bfe.{type_}", type_, [type_, "u32", "u32"], [a, at, length], a.dtype.type)

    def field(x, p, n):
        # The PTX ISA's own description, bit by bit.
        if n == 0:
            return 0
        top = min(p + n - 1, 31)
        sign = (x >> top) & 1 if type_ == "s32" else 0
        return sum(((x >> (p + i)) & 1 if i < n and p + i <= 31 else sign) << i for i in range(32))

    expected = wrapped(
        [field(int(x) & 0xFFFFFFFF, int(p), int(n)) for x, p, n in zip(a, at, length, strict=True)], "u32"
    )
    np.testing.assert_array_equal(out.view(np.uint32), expected)


def test_bit_field_insert_permute_and_lop3():
    a, b, c = integers(RNG, "u32"), integers(RNG, "u32")[::-1].copy(), integers(RNG, "u32")
    at, length = RNG.integers(0, 31, 64).astype(np.uint32), RNG.integers(0, 33, 64).astype(np.uint32)
    out = lanewise("bfi.b32", "b32", ["b32", "b32", "u32", "u32"], [a, b, at, length], np.uint32)
    masks = [((1 << int(n)) - 1) << int(p) & 0xFFFFFFFF for p, n in zip(at, length, strict=True)]
    expected = [(int(y) & ~m) | (int(x) << int(p) & m) for x, y, m, p in zip(a, b, masks, at, strict=True)]
    np.testing.assert_array_equal(out, np.array(expected, np.uint32))
    select = RNG.integers(0, 65536, 64).astype(np.uint32)
    out = lanewise("prmt.b32", "b32", ["b32", "b32", "b32"], [a, b, select], np.uint32)

    def permuted(x, y, s):
        source = (int(y) << 32 | int(x)).to_bytes(8, "little")
        chosen = [int(s) >> 4 * i & 15 for i in range(4)]
        return int.from_bytes(
            bytes((0xFF if source[k & 7] & 0x80 else 0) if k & 8 else source[k] for k in chosen), "little"
        )

    np.testing.assert_array_equal(out, np.array([permuted(*v) for v in zip(a, b, select, strict=True)], np.uint32))
    out = lanewise("lop3.b32", "b32", ["b32"] * 3, [a, b, c], np.uint32, extra=", 0xCA")
    np.testing.assert_array_equal(out, (a & b) | (~a & c))


def test_counts():
    a, b = integers(RNG, "u32"), integers(RNG, "u64")
    np.testing.assert_array_equal(lanewise("popc.b32", "u32", ["b32"], [a], np.uint32), [bin(x).count("1") for x in a])
    np.testing.assert_array_equal(
        lanewise("clz.b32", "u32", ["b32"], [a], np.uint32), [32 - int(x).bit_length() for x in a]
    )
    np.testing.assert_array_equal(lanewise("popc.b64", "u32", ["b64"], [b], np.uint32), [bin(x).count("1") for x in b])


def test_reversals_and_funnel_shifts():
    a, b, n = integers(RNG, "u32"), integers(RNG, "u32"), RNG.integers(0, 64, 64).astype(np.uint32)
    out = lanewise("brev.b32", "b32", ["b32"], [a], np.uint32)
    np.testing.assert_array_equal(out, [int(f"{int(x):032b}"[::-1], 2) for x in a])
    out = lanewise("bfind.u32", "u32", ["u32"], [a], np.uint32)
    np.testing.assert_array_equal(out, [(int(x).bit_length() - 1) & 0xFFFFFFFF for x in a])
    both = [(int(high) << 32 | int(low), int(k) & 31) for low, high, k in zip(a, b, n, strict=True)]
    out = lanewise("shf.l.wrap.b32", "b32", ["b32"] * 3, [a, b, n], np.uint32)
    np.testing.assert_array_equal(out, wrapped([x << k >> 32 for x, k in both], "u32"))
    out = lanewise("shf.r.wrap.b32", "b32", ["b32"] * 3, [a, b, n], np.uint32)
    np.testing.assert_array_equal(out, wrapped([x >> k for x, k in both], "u32"))


@pytest.mark.parametrize("type_", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_comparisons_and_selection(type_):
    a, b = integers(RNG, type_), RNG.permutation(integers(RNG, type_))
    p = RNG.integers(0, 2, len(a)).astype(bool)
    for cmp, of in {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}.items():
        np.testing.assert_array_equal(lanewise(f"setp.{cmp}.{type_}", "pred", [type_] * 2, [a, b], np.uint32), of(a, b))
    out = lanewise(f"setp.lt.and.{type_}", "pred", [type_, type_, "pred"], [a, b, p], np.uint32)
    np.testing.assert_array_equal(out, (a < b) & p)
    out = lanewise(f"selp.b{type_[1:]}", type_, [type_, type_, "pred"], [a, b, p], a.dtype.type)
    np.testing.assert_array_equal(out, np.where(p, a, b))


def test_predicates():
    a, b = RNG.integers(0, 2, 64).astype(bool), RNG.integers(0, 2, 64).astype(bool)
    for op, of in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        np.testing.assert_array_equal(lanewise(f"{op}.pred", "pred", ["pred"] * 2, [a, b], np.uint32), of(a, b))
    np.testing.assert_array_equal(lanewise("not.pred", "pred", ["pred"], [a], np.uint32), ~a)
