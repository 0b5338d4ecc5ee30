"""Hyper-connections entry by entry in Python floats (docs/model.md, "Hyper-connections"), with bounds for fp32."""

import math

import torch

from .numeric import FUNCTION, U32, U, f64


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mixes(streams, fn, norm_eps):
    """m and how far fp32 sums may move it, each a list of len(fn) floats, for one token's streams [n, H]."""
    flat = [v for stream in f64(streams).tolist() for v in stream]
    norm = 1 / math.sqrt(sum(v * v for v in flat) / len(flat) + norm_eps)
    values, errors = [], []
    for row in f64(fn).tolist():
        values.append(sum(a * b for a, b in zip(flat, row, strict=True)) * norm)
        size = sum(abs(a * b) for a, b in zip(flat, row, strict=True)) * norm
        # The dot product and, with half the weight, the mean of squares; the rest is the root and two products.
        errors.append((1.5 * len(flat) * U32 + 2 * FUNCTION) * size)
    return values, errors


def sinkhorn(logits, eps, iters):
    """Rows j (source) and columns k (destination): a softmax, one column step, then iters - 1 of both."""
    n = len(logits)
    c = []
    for row in logits:
        weights = [math.exp(v - max(row)) for v in row]
        c.append([w / sum(weights) + eps for w in weights])

    def divide_columns():
        for k in range(n):
            total = sum(c[j][k] for j in range(n)) + eps
            for j in range(n):
                c[j][k] /= total

    divide_columns()
    for _ in range(iters - 1):
        for j in range(n):
            total = sum(c[j]) + eps
            c[j] = [v / total for v in c[j]]
        divide_columns()
    return c


def weighted_sum(weights, streams):
    """sum_i weights[i] streams[i] and the sum of magnitudes, both [H] fp64."""
    streams = f64(streams)
    total = sum(w * s for w, s in zip(weights, streams, strict=True))
    return total, sum(abs(w) * s.abs() for w, s in zip(weights, streams, strict=True))


def normed(x, bound, dtype, weight, eps):
    """An input of a sublayer after its norm, and a bound, from the fp64 x [H] before it and its bound."""
    # One rounding to the dtype, then the root of a mean of squares, which moves no more than the vector's norm does.
    bound = bound + U[dtype] * (x.abs() + bound)
    norm = 1 / math.sqrt(x.square().mean().item() + eps)
    shift = bound.norm() / x.norm() + len(x) * U32 + FUNCTION
    y, weight = x * norm, f64(weight)
    return y * weight, (bound * norm + (shift + 2 * U32) * y.abs()) * weight.abs()


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)
