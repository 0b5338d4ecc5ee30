"""Products of matrices with few rows, each sum in one order, independent of the number of rows.

A row's result is the same bits alone and among others, and small products cost less than a BLAS takes to begin.
"""

from __future__ import annotations

from typing import Any

from .arithmetic import ZERO
from .compiling import helper
from .memory import BF16, FP32, from_bf16, from_fp16, get, get_u16, put
from .vectors import LANES, fma, lane_sum, lanes, lanes_bf16, lanes_fp16, no_lanes, put_lanes, put_sums, splat


@helper
def _bf16(address, i):
    return from_bf16(get_u16(address, i))


@helper
def _fp16(address, i):
    return from_fp16(get_u16(address, i))


def _dots_with(read: Any, read_one: Any, size: int) -> Any:
    """`dots` for a matrix `b` whose elements of `size` bytes are read by `read`, and one by one by `read_one`."""

    @helper
    def rest(a, b, start, width):
        """The products of the last elements, which do not fill a vector."""
        s = ZERO
        for d in range(start, width):
            s += get(a, d) * read_one(b, d)
        return s

    @helper
    def one(a, b, width):
        s, whole = no_lanes(), width // LANES * LANES
        for d in range(0, whole, LANES):
            s = fma(lanes(a, d), read(b, d), s)
        return lane_sum(s) + rest(a, b, whole, width)

    @helper
    def finish(a, b, whole, width, out):
        if whole < width:
            for j in range(4):
                put(out, j, get(out, j) + rest(a, b + j * width * size, whole, width))

    @helper
    def row(a, b, width, out):
        """A row of `a` with four of `b`."""
        b1, b2, b3 = b + size * width, b + 2 * size * width, b + 3 * size * width
        s0 = s1 = s2 = s3 = no_lanes()
        whole = width // LANES * LANES
        for d in range(0, whole, LANES):
            x = lanes(a, d)
            s0, s1 = fma(x, read(b, d), s0), fma(x, read(b1, d), s1)
            s2, s3 = fma(x, read(b2, d), s2), fma(x, read(b3, d), s3)
        put_sums(out, s0, s1, s2, s3)
        finish(a, b, whole, width, out)

    @helper
    def tile(a, b, width, out, stride):
        """Four rows of `a` with four of `b`."""
        a1, a2, a3 = a + 4 * width, a + 8 * width, a + 12 * width
        b1, b2, b3 = b + size * width, b + 2 * size * width, b + 3 * size * width
        s00 = s01 = s02 = s03 = no_lanes()
        s10 = s11 = s12 = s13 = no_lanes()
        s20 = s21 = s22 = s23 = no_lanes()
        s30 = s31 = s32 = s33 = no_lanes()
        whole = width // LANES * LANES
        for d in range(0, whole, LANES):
            y0, y1, y2, y3 = read(b, d), read(b1, d), read(b2, d), read(b3, d)
            x = lanes(a, d)
            s00, s01, s02, s03 = fma(x, y0, s00), fma(x, y1, s01), fma(x, y2, s02), fma(x, y3, s03)
            x = lanes(a1, d)
            s10, s11, s12, s13 = fma(x, y0, s10), fma(x, y1, s11), fma(x, y2, s12), fma(x, y3, s13)
            x = lanes(a2, d)
            s20, s21, s22, s23 = fma(x, y0, s20), fma(x, y1, s21), fma(x, y2, s22), fma(x, y3, s23)
            x = lanes(a3, d)
            s30, s31, s32, s33 = fma(x, y0, s30), fma(x, y1, s31), fma(x, y2, s32), fma(x, y3, s33)
        put_sums(out, s00, s01, s02, s03)
        put_sums(out + 4 * stride, s10, s11, s12, s13)
        put_sums(out + 8 * stride, s20, s21, s22, s23)
        put_sums(out + 12 * stride, s30, s31, s32, s33)
        for i in range(4):
            finish(a + 4 * i * width, b, whole, width, out + 4 * i * stride)

    @helper
    def dots(a, a_rows, b, b_rows, width, out, stride):
        for j in range(0, b_rows // 4 * 4, 4):
            part = b + j * size * width
            for i in range(0, a_rows // 4 * 4, 4):
                tile(a + 4 * i * width, part, width, out + 4 * (i * stride + j), stride)
            for i in range(a_rows // 4 * 4, a_rows):
                row(a + 4 * i * width, part, width, out + 4 * (i * stride + j))
        for j in range(b_rows // 4 * 4, b_rows):
            for i in range(a_rows):
                put(out, i * stride + j, one(a + 4 * i * width, b + j * size * width, width))

    return dots


dots_fp32 = _dots_with(lanes, get, 4)
"""dots_fp32(a, a_rows, b, b_rows, width, out, stride): fp32 rows of `a` times fp32 rows of `b`, to rows of `out` that
start `stride` values after each other."""
_dots_bf16 = _dots_with(lanes_bf16, _bf16, 2)
_dots_fp16 = _dots_with(lanes_fp16, _fp16, 2)


@helper
def dots(a, a_rows, b, dtype, b_rows, width, out, stride):
    """`dots_fp32` for rows `b` of any dtype."""
    if dtype == FP32:
        dots_fp32(a, a_rows, b, b_rows, width, out, stride)
    elif dtype == BF16:
        _dots_bf16(a, a_rows, b, b_rows, width, out, stride)
    else:
        _dots_fp16(a, a_rows, b, b_rows, width, out, stride)


@helper
def add_weighted(weights, stride, heads, rows, count, width, out):
    """Add `count` rows times a head's weights to that head's row of `out`; `heads` is a multiple of 4."""
    whole = width // LANES * LANES
    for h in range(0, heads, 4):
        w0 = weights + 4 * h * stride
        w1, w2, w3 = w0 + 4 * stride, w0 + 8 * stride, w0 + 12 * stride
        o0 = out + 4 * h * width
        o1, o2, o3 = o0 + 4 * width, o0 + 8 * width, o0 + 12 * width
        for d in range(0, whole, LANES):
            s0, s1, s2, s3 = lanes(o0, d), lanes(o1, d), lanes(o2, d), lanes(o3, d)
            for i in range(count):
                x = lanes(rows, i * width + d)
                s0, s1 = fma(splat(get(w0, i)), x, s0), fma(splat(get(w1, i)), x, s1)
                s2, s3 = fma(splat(get(w2, i)), x, s2), fma(splat(get(w3, i)), x, s3)
            put_lanes(o0, d, s0)
            put_lanes(o1, d, s1)
            put_lanes(o2, d, s2)
            put_lanes(o3, d, s3)
        for d in range(whole, width):
            for j in range(4):
                s = get(o0, j * width + d)
                for i in range(count):
                    s += get(w0, j * stride + i) * get(rows, i * width + d)
                put(o0, j * width + d, s)
