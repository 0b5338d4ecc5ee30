"""The mixing parameters of hyper-connections: what `mhc_pre`, `mhc_post_pre` and `mhc_head` have in common."""

from __future__ import annotations

from .arithmetic import ONE, ZERO, exp, inverse_rms, sigmoid
from .compiling import helper
from .memory import get, put
from .products import dots_fp32


@helper
def mix(flat, size, fn, count, norm_eps, out):
    """The products of the flattened streams with the `count` rows of `fn`, normed, to `out`."""
    dots_fp32(flat, 1, fn, count, size, out, count)
    factor = inverse_rms(flat, size, norm_eps)
    for i in range(count):
        put(out, i, get(out, i) * factor)


@helper
def gates(mixes, scale, base, n, extra, factor, out):
    """`factor * sigmoid(mixes * scale + base) + extra`, n of them."""
    for i in range(n):
        put(out, i, factor * sigmoid(get(mixes, i) * scale + get(base, i)) + extra)


@helper
def weighted_streams(streams, n, hidden, weights, out):
    """The sum of the streams, each times its weight."""
    for i in range(hidden):
        put(out, i, ZERO)
    for s in range(n):
        weight, row = get(weights, s), streams + 4 * s * hidden
        for i in range(hidden):
            put(out, i, get(out, i) + weight * get(row, i))


@helper
def sinkhorn(comb, n, eps, iters):
    """n x n logits at `comb` to a nearly doubly stochastic matrix, in place; the first row step is the softmax."""
    for r in range(n):
        row = comb + 4 * r * n
        top = get(row, 0)
        for c in range(1, n):
            top = max(top, get(row, c))
        whole = ZERO
        for c in range(n):
            put(row, c, exp(get(row, c) - top))
            whole += get(row, c)
        for c in range(n):
            put(row, c, get(row, c) / whole + eps)
    for step in range(2 * iters - 1):
        # Columns first: rows are those of the softmax.
        along, across = (n, 1) if step % 2 == 0 else (1, n)
        for line in range(n):
            whole = eps
            for i in range(n):
                whole += get(comb, line * across + i * along)
            inverse = ONE / whole
            for i in range(n):
                at = line * across + i * along
                put(comb, at, get(comb, at) * inverse)
