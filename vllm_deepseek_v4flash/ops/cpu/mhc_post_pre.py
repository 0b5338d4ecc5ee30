from __future__ import annotations

import torch

from . import threads
from .arithmetic import ONE, ZERO
from .compiling import helper, kernel
from .memory import code, get, load, packed, put, rounded, size_of, store
from .mixing import gates, mix, sinkhorn, weighted_streams
from .rms_norm import normalise


def mhc_post_pre(
    x: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return leave_and_enter(
        x, streams, post, comb, fn, scale, base, norm_weight,
        norm_eps=norm_eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters,
    )  # fmt: skip


def leave_and_enter(
    x: torch.Tensor | None,
    streams: torch.Tensor,
    post: torch.Tensor | None,
    comb: torch.Tensor | None,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc_post_pre`; without `x`, `mhc_pre` on the streams as they are."""
    num_tokens, n, hidden = streams.shape
    x, streams, post, comb, fn, scale, base, norm_weight = packed(x, streams, post, comb, fn, scale, base, norm_weight)
    spread = streams if x is None else torch.empty_like(streams)
    entered = streams.new_empty((num_tokens, hidden))
    new_post = torch.empty((num_tokens, n))
    new_comb = torch.empty((num_tokens, n, n))
    threads.run(
        _leave_and_enter, num_tokens, float((3 + 2 * n) * streams.numel()),
        2 * n * hidden + 3 * hidden + (2 + n) * n + 4 + 2 * n,
        0 if x is None else x.data_ptr(), streams.data_ptr(), spread.data_ptr(), code(streams), n, hidden,
        0 if post is None else post.data_ptr(), 0 if comb is None else comb.data_ptr(),
        fn.data_ptr(), scale.data_ptr(), base.data_ptr(),
        0 if norm_weight is None else norm_weight.data_ptr(), 0 if norm_weight is None else code(norm_weight),
        norm_eps, hc_eps, sinkhorn_iters, entered.data_ptr(), new_post.data_ptr(), new_comb.data_ptr(),
    )  # fmt: skip
    return spread, entered, new_post, new_comb


@helper
def spread_output(x, streams, post, comb, n, hidden, dtype, out):
    """`post[k] x + sum_j comb[j, k] streams[j]` for every stream k, rounded to `dtype`."""
    for k in range(n):
        row, weight = out + 4 * k * hidden, get(post, k)
        for i in range(hidden):
            put(row, i, weight * get(x, i))
        for j in range(n):
            source, weight = streams + 4 * j * hidden, get(comb, j * n + k)
            for i in range(hidden):
                put(row, i, get(row, i) + weight * get(source, i))
        for i in range(hidden):
            put(row, i, rounded(get(row, i), dtype))


@kernel
def _leave_and_enter(
    begin: int, end: int, room: int,
    x: int, streams: int, spread: int, dtype: int, n: int, hidden: int,
    post: int, comb: int, fn: int, scale: int, base: int, norm_weight: int, norm_dtype: int,
    norm_eps: float, hc_eps: float, iters: int, entered: int, new_post: int, new_comb: int,
) -> None:  # fmt: skip
    size, count = size_of(dtype), (2 + n) * n
    flat, before = room, room + 4 * n * hidden
    row = before + 4 * n * hidden
    output, weight = row + 4 * hidden, row + 8 * hidden
    mixes = row + 12 * hidden
    pre = mixes + 4 * (count + 4)
    factors = 0
    if norm_weight:
        factors = weight
        load(norm_weight, norm_dtype, hidden, weight)
    for t in range(begin, end):
        at = t * n * hidden * size
        if x:
            load(streams + at, dtype, n * hidden, before)
            load(x + t * hidden * size, dtype, hidden, output)
            spread_output(output, before, post + 4 * t * n, comb + 4 * t * n * n, n, hidden, dtype, flat)
            store(spread + at, dtype, n * hidden, flat)
        else:
            load(streams + at, dtype, n * hidden, flat)
        mix(flat, n * hidden, fn, count, norm_eps, mixes)
        gates(mixes, get(scale, 0), base, n, hc_eps, ONE, pre)
        gates(mixes + 4 * n, get(scale, 1), base + 4 * n, n, ZERO, ONE + ONE, new_post + 4 * t * n)
        matrix = new_comb + 4 * t * n * n
        for i in range(n * n):
            put(matrix, i, get(mixes, 2 * n + i) * get(scale, 2) + get(base, 2 * n + i))
        sinkhorn(matrix, n, hc_eps, iters)
        weighted_streams(flat, n, hidden, pre, row)
        for i in range(hidden):
            put(row, i, rounded(get(row, i), dtype))
        if norm_weight:
            normalise(row, hidden, factors, norm_eps, dtype)
        store(entered + t * hidden * size, dtype, hidden, row)
