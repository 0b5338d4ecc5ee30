"""Arithmetic for kernels: exp, sigmoid, norms and rotations of fp32 rows."""

from __future__ import annotations

import math

import numpy as np

from .compiling import helper, summing
from .memory import get, number, put

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
    return ONE / (ONE + exp(-x))


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
