"""Values that the tests of instructions share."""

import numpy as np


def integers(rng, type_, count=64):
    """Values of a PTX integer type, its extremes among them."""
    bits = int(type_[1:])
    dtype = np.dtype(f"{'i' if type_[0] == 's' else 'u'}{bits // 8}")
    values = rng.integers(0, 2**bits, count, dtype=np.uint64).astype(f"u{bits // 8}").view(dtype)
    info = np.iinfo(dtype)
    values[:6] = [0, 1, info.max, info.min, 7, 3]
    return values


def wrapped(values, type_):
    """Python's integers modulo the type's range, as unsigned ones."""
    bits = int(type_[1:])
    return np.array([int(v) & ((1 << bits) - 1) for v in values], np.uint64).astype(f"u{bits // 8}")


def dtype_of(type_):
    return np.dtype(f"{'i' if type_[0] == 's' else 'u'}{int(type_[1:]) // 8}")


def floats(rng, count=64):
    """fp32 of all magnitudes, special values among them."""
    values = (rng.standard_normal(count) * 10.0 ** rng.integers(-20, 20, count)).astype(np.float32)
    values[:10] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.5, 3e-42, 3.4e38, 65504]
    return values
