"""Hyper-connections entry by entry in Python floats (docs/model.md, "Hyper-connections"), with bounds for fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .numeric import FUNCTION, U32, U, assert_within, f64, normal

OPTIONS: dict[str, Any] = {"norm_eps": 1e-6, "hc_eps": 1e-6, "sinkhorn_iters": 20}
SHAPES = [(5, 4, 24), (1, 4, 100), (3, 3, 16), (2, 2, 8), (2, 1, 8), (67, 3, 40)]
"""(tokens, streams, hidden) that `mhc_pre` and `mhc_post_pre` are tested with."""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mixes(streams: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> tuple[list[float], list[float]]:
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


def sinkhorn(logits: Sequence[Sequence[float]], eps: float, iters: int) -> list[list[float]]:
    """Rows j (source) and columns k (destination): a softmax, one column step, then iters - 1 of both."""
    n = len(logits)
    c = []
    for row in logits:
        weights = [math.exp(v - max(row)) for v in row]
        c.append([w / sum(weights) + eps for w in weights])

    def divide_columns() -> None:
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


def weighted_sum(weights: Sequence[float], streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_i weights[i] streams[i] and the sum of magnitudes, both [H] fp64."""
    streams = f64(streams)
    total, size = torch.zeros_like(streams[0]), torch.zeros_like(streams[0])
    for weight, stream in zip(weights, streams, strict=True):
        total += weight * stream
        size += abs(weight) * stream.abs()
    return total, size


def normed(
    x: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """An input of a sublayer after its norm, and a bound, from the fp64 x [H] before it and its bound."""
    # One rounding to the dtype, then the root of a mean of squares, which moves no more than the vector's norm does.
    bound = bound + U[dtype] * (x.abs() + bound)
    norm = 1 / math.sqrt(x.square().mean().item() + eps)
    shift = bound.norm() / x.norm() + len(x) * U32 + FUNCTION
    y, weight = x * norm, f64(weight)
    return y * weight, (bound * norm + (shift + 2 * U32) * y.abs()) * weight.abs()


def tensor(rows: Sequence[float] | Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def leaving(
    rng: torch.Generator,
    device: torch.device,
    *,
    tokens: int = 5,
    n: int = 4,
    hidden: int = 24,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `mhc_post`: x, streams, post and comb."""
    x = normal(rng, tokens, hidden, device=device, dtype=dtype)
    streams = normal(rng, tokens, n, hidden, device=device, dtype=dtype)
    return x, streams, normal(rng, tokens, n, device=device), normal(rng, tokens, n, n, device=device)


def entering(
    rng: torch.Generator,
    device: torch.device,
    *,
    tokens: int = 5,
    n: int = 4,
    hidden: int = 24,
    dtype: torch.dtype = torch.float32,
    base: float = 1.0,
    norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Arguments of `mhc_pre`: streams, fn, scale, base and norm_weight (None unless `norm`)."""
    streams = normal(rng, tokens, n, hidden, device=device, dtype=dtype)
    fn = normal(rng, (2 + n) * n, n * hidden, scale=(n * hidden) ** -0.5, device=device)
    scale = torch.tensor([0.8, 1.3, 1.7], device=device)
    norm_weight = normal(rng, hidden, device=device, dtype=dtype) if norm else None
    return streams, fn, scale, normal(rng, (2 + n) * n, scale=base, device=device), norm_weight


def check_entered(
    actual: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    streams: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> None:
    """`actual` is what `mhc_pre` returns for these arguments: x, post and comb, token by token."""
    x, post, comb = actual
    assert (x.dtype, post.dtype, comb.dtype) == (streams.dtype, torch.float32, torch.float32)
    tokens, n, _ = streams.shape
    s, b = f64(scale).tolist(), f64(base).tolist()
    assert post.shape == (tokens, n)
    assert comb.shape == (tokens, n, n)
    for t in range(tokens):
        m, error = mixes(streams[t], fn, norm_eps)
        pre = [sigmoid(m[i] * s[0] + b[i]) + hc_eps for i in range(n)]
        # A sigmoid changes by at most a quarter of its argument's error; the argument itself is rounded twice.
        moved = [abs(s[min(i // n, 2)]) * e + 2 * U32 * (abs(m[i]) * 2 + abs(b[i])) for i, e in enumerate(error)]
        mixed, size = weighted_sum(pre, streams[t])
        bound = max(moved[:n]) / 4 * f64(streams[t]).abs().sum(0) + ((n + 1) * U32 + FUNCTION) * size
        if norm_weight is not None:
            mixed, bound = normed(mixed, bound, streams.dtype, norm_weight, norm_eps)
        assert_within(x[t], mixed, bound)
        expected = tensor([2 * sigmoid(m[n + k] * s[1] + b[n + k]) for k in range(n)])
        assert_within(post[t], expected, tensor(moved[n : 2 * n]) / 2 + FUNCTION)
        logits = [[m[2 * n + n * j + k] * s[2] + b[2 * n + n * j + k] for k in range(n)] for j in range(n)]
        # exp(logit) moves relatively by the logit's error, and so do the row and column factors, which divide by sums
        # of them: within four times. Each of the 2 * iters divisions adds the roundings of n additions and a quotient.
        relative = 4 * max(moved[2 * n :]) + 2 * sinkhorn_iters * ((n + 1) * U32 + FUNCTION)
        expected = tensor(sinkhorn(logits, hc_eps, sinkhorn_iters))
        assert_within(comb[t], expected, relative * expected)
