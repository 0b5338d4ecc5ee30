"""What kernels compute with: dot products in tiles, exp, sigmoid, norms and rotations of fp32 rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .compiling import helper, summing
from .memory import BF16, FP32, from_bf16, from_fp16, get, get_apart, get_u16, number, put, put_apart

ZERO, ONE = np.float32(0.0), np.float32(1.0)
INFINITY = np.float32(np.inf)
_LOG2_E = np.float32(math.log2(math.e))
# ln 2 in two parts: the first has so few bits that its product with an exponent is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST, _LARGEST = np.float32(-87.0), np.float32(88.0)
_HALF, _SIXTH, _24TH = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_120TH, _720TH, _5040TH = np.float32(1 / 120), np.float32(1 / 720), np.float32(1 / 5040)


@helper
def exp(x):
    """e^x within 2 ulp, 0 below -87 and infinity above 88; unlike the library's, it compiles to vector instructions."""
    clamped = min(max(x, _SMALLEST), _LARGEST)
    exponent = np.floor(clamped * _LOG2_E + _HALF)
    r = (clamped - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    y = ((_5040TH * r + _720TH) * r + _120TH) * r + _24TH
    y = (((y * r + _SIXTH) * r + _HALF) * r + ONE) * r + ONE
    y *= number((np.int64(exponent) + 127) << 23)
    y = INFINITY if x > _LARGEST else y
    return x if x != x else (ZERO if x < _SMALLEST else y)


@helper
def sigmoid(x):
    return ONE / (ONE + math.exp(-x))


@helper
def _bf16(address, i):
    return from_bf16(get_u16(address, i))


@helper
def _fp16(address, i):
    return from_fp16(get_u16(address, i))


def _products_with(read: Any, size: int) -> Any:
    """`products` for a matrix whose elements of `size` bytes are read by `read`."""

    @summing
    def products_of_rows(x, matrix, rows, width, out):
        whole, row = rows // 4 * 4, size * width
        for j in range(0, whole, 4):
            r0 = matrix + j * row
            r1, r2, r3 = r0 + row, r0 + 2 * row, r0 + 3 * row
            s0 = s1 = s2 = s3 = ZERO
            for d in range(width):
                value = get(x, d)
                s0 += value * read(r0, d)
                s1 += value * read(r1, d)
                s2 += value * read(r2, d)
                s3 += value * read(r3, d)
            _put_4(out + 4 * j, s0, s1, s2, s3)
        for j in range(whole, rows):
            s0 = ZERO
            for d in range(width):
                s0 += get(x, d) * read(matrix + j * row, d)
            put(out, j, s0)

    return products_of_rows


_products_fp32 = _products_with(get, 4)
_products_bf16 = _products_with(_bf16, 2)
_products_fp16 = _products_with(_fp16, 2)


@helper
def products(x, matrix, dtype, rows, width, out):
    """The dot products of the fp32 row `x` with every row of a matrix of `dtype`."""
    if dtype == FP32:
        _products_fp32(x, matrix, rows, width, out)
    elif dtype == BF16:
        _products_bf16(x, matrix, rows, width, out)
    else:
        _products_fp16(x, matrix, rows, width, out)


@summing
def dots_4x4(a, a_rows, b, b_rows, width, out, stride):
    """The dot products of every row of `a` with every row of `b` to rows of `out` that lie `stride` apart.

    Both have a multiple of 4 rows: another loop for the rest would sum in another order, and a token's result
    depend on the number of tokens.
    """
    for i in range(0, a_rows, 4):
        a0 = a + 4 * i * width
        a1, a2, a3 = a0 + 4 * width, a0 + 8 * width, a0 + 12 * width
        for j in range(0, b_rows, 4):
            b0 = b + 4 * j * width
            b1, b2, b3 = b0 + 4 * width, b0 + 8 * width, b0 + 12 * width
            s00 = s01 = s02 = s03 = ZERO
            s10 = s11 = s12 = s13 = ZERO
            s20 = s21 = s22 = s23 = ZERO
            s30 = s31 = s32 = s33 = ZERO
            for d in range(width):
                x0, x1, x2, x3 = get(a0, d), get(a1, d), get(a2, d), get(a3, d)
                y0, y1, y2, y3 = get(b0, d), get(b1, d), get(b2, d), get(b3, d)
                s00 += x0 * y0
                s01 += x0 * y1
                s02 += x0 * y2
                s03 += x0 * y3
                s10 += x1 * y0
                s11 += x1 * y1
                s12 += x1 * y2
                s13 += x1 * y3
                s20 += x2 * y0
                s21 += x2 * y1
                s22 += x2 * y2
                s23 += x2 * y3
                s30 += x3 * y0
                s31 += x3 * y1
                s32 += x3 * y2
                s33 += x3 * y3
            _put_4(out + 4 * (i * stride + j), s00, s01, s02, s03)
            _put_4(out + 4 * ((i + 1) * stride + j), s10, s11, s12, s13)
            _put_4(out + 4 * ((i + 2) * stride + j), s20, s21, s22, s23)
            _put_4(out + 4 * ((i + 3) * stride + j), s30, s31, s32, s33)


@helper
def _put_4(out, s0, s1, s2, s3):
    put(out, 0, s0)
    put(out, 1, s1)
    put(out, 2, s2)
    put(out, 3, s3)


@helper
def add_weighted(weights, rows, count, width, out):
    """Add `count` (a multiple of 4) rows of `width` values, each times its weight, to the row `out`."""
    for i in range(0, count, 4):
        r0 = rows + 4 * i * width
        r1, r2, r3 = r0 + 4 * width, r0 + 8 * width, r0 + 12 * width
        w0, w1, w2, w3 = get(weights, i), get(weights, i + 1), get(weights, i + 2), get(weights, i + 3)
        for d in range(width):
            x = get_apart(r0, d) * w0 + get_apart(r1, d) * w1 + get_apart(r2, d) * w2 + get_apart(r3, d) * w3
            put_apart(out, d, get(out, d) + x)


@summing
def total(x, count):
    whole = ZERO
    for i in range(count):
        whole += get(x, i)
    return whole


@summing
def sum_of_squares(x, count):
    whole = ZERO
    for i in range(count):
        whole += get(x, i) * get(x, i)
    return whole


@helper
def inverse_rms(x, count, eps):
    """1 / sqrt(mean(x^2) + eps)."""
    return ONE / math.sqrt(sum_of_squares(x, count) / np.float32(count) + eps)


@helper
def rotate(x, table, pairs, sign):
    """Rotate the `pairs` pairs at `x` by the angles of `table` (cosines, then sines) times `sign`."""
    for k in range(pairs):
        cos, sin = get(table, k), sign * get(table, pairs + k)
        even, odd = get(x, 2 * k), get(x, 2 * k + 1)
        put(x, 2 * k, even * cos - odd * sin)
        put(x, 2 * k + 1, even * sin + odd * cos)
