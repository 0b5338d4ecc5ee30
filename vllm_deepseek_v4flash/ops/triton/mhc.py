"""Manifold-constrained hyper-connections in two launches (docs/model.md, "Hyper-connections").

`mix_streams` goes over the streams once: it spreads a sublayer's output over them and multiplies the result with the
next sublayer's `fn`, in parts of the hidden dimension that lie side by side. `enter_sublayer` adds up the parts and
goes over the tokens: their weights, and the weighted sums of their streams.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import block, device_of, launch

_SUMS = 4096  # partial sums that one program of `enter_sublayer` holds at a time


def mix_streams(
    streams: torch.Tensor,
    fn: torch.Tensor | None,
    sublayer: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The streams [T, n, H] after `sublayer`, an (x, post, comb) of `mhc_post`, and partial products with `fn`.

    The products are [parts, T, >= len(fn) + 1] fp32; column len(fn) holds sums of squares. No parts without `fn`.
    """
    num_tokens, n, hidden = streams.shape
    outputs = 0 if fn is None else fn.shape[0]
    streams = _rows(streams)
    if sublayer is None:
        x, post, comb, out = streams, None, None, streams
    else:
        x, post, comb = _rows(sublayer[0]), sublayer[1].contiguous(), sublayer[2].contiguous()
        out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    # fp16 and fp32 are multiplied in two and three pieces, and larger blocks of them would not fit the registers.
    block_t = 64 if num_tokens > 16 and streams.dtype is torch.bfloat16 else 16
    block_h = min(block(hidden, 16), 32)
    blocks, tiles = triton.cdiv(num_tokens, block_t), triton.cdiv(hidden, block_h)
    # With few tokens every multiprocessor takes a part, to read fn together; with many, fewer parts are to be added up.
    steps = triton.cdiv(tiles, block(triton.cdiv(2 * device_of(streams).multiprocessors, max(blocks, 1))))
    parts, width = triton.cdiv(tiles, steps), block(outputs + 1, 16)
    partial = torch.empty((parts if outputs else 0, num_tokens, width), dtype=torch.float32, device=streams.device)
    launch(
        _mix_streams, (blocks, parts),
        streams, streams.stride(0), streams.stride(1), x, x.stride(0), post, comb, out,
        None if fn is None else fn.contiguous(), partial, num_tokens, hidden, steps,
        N=n, OUTPUTS=outputs, WIDTH=width, BLOCK_T=block_t, BLOCK_H=block_h, SPREAD=sublayer is not None,
        # Left to itself, ptxas spills registers for the sake of more programs at once.
        num_warps=8, num_stages=1, maxnreg=None if block_t == 64 else 255,
    )  # fmt: skip
    return out, partial


def enter_sublayer(
    streams: torch.Tensor,
    partial: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc_pre`'s x, post and comb from what `mix_streams` returned; without iterations, `mhc_head`'s x alone."""
    num_tokens, n, hidden = streams.shape
    parts, _, width = partial.shape
    x = torch.empty((num_tokens, hidden), dtype=streams.dtype, device=streams.device)
    post = torch.empty((num_tokens, n), dtype=torch.float32, device=streams.device)
    comb = torch.empty((num_tokens, n, n), dtype=torch.float32, device=streams.device)
    block_p, block_n, block_h = block(parts), block(n), block(hidden)
    block_s = max(1, _SUMS // (block_p * block_n**2 * 2))
    # Sinkhorn's many short steps run beside the sums, as programs of their own, which start first.
    groups = triton.cdiv(num_tokens, block_s) if sinkhorn_iters else 0
    launch(
        _enter_sublayer, (groups + num_tokens,),
        streams, streams.stride(0), streams.stride(1), partial, scale, base,
        None if norm_weight is None else norm_weight.contiguous(), x, post, comb, num_tokens, groups, parts, hidden,
        norm_eps, hc_eps, N=n, OUTPUTS=base.shape[0], WIDTH=width, ITERS=sinkhorn_iters,
        BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_S=block_s, BLOCK_H=block_h,
        num_warps=min(8, max(1, block_h // 512)), maxnreg=128,
    )  # fmt: skip
    return x, post, comb


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def _mix_streams(
    streams, token_stride, stream_stride, x, x_stride, post, comb, out, fn, partial, num_tokens, hidden, steps,
    N: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    real = t < num_tokens
    o = tl.arange(0, WIDTH)
    source = streams + (t * token_stride)[:, None]
    if SPREAD:
        posts, combs = (), ()
        for k in tl.static_range(N):
            posts += (tl.load(post + t * N + k, mask=real, other=0.0)[:, None],)
            for j in tl.static_range(N):
                combs += (tl.load(comb + (t * N + j) * N + k, mask=real, other=0.0)[:, None],)
    sums, squares = tl.zeros((BLOCK_T, WIDTH), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for step in range(steps):
        h = ((part * steps + step) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
        mask = real[:, None] & (h < hidden)
        if SPREAD:
            values = ()
            for k in tl.static_range(N):
                values += (tl.load(source + k * stream_stride + h, mask=mask, other=0.0),)
            output = tl.load(x + (t * x_stride)[:, None] + h, mask=mask, other=0.0).to(tl.float32)
            for k in tl.static_range(N):
                mixed = posts[k] * output
                for j in tl.static_range(N):
                    mixed += combs[k * N + j] * values[j].to(tl.float32)
                tl.store(out + (t * N + k)[:, None] * hidden + h, mixed.to(out.dtype.element_ty), mask=mask)
        if OUTPUTS > 0:
            if SPREAD:
                # The streams are read back below. Kept in registers, they would be mixed twice: for the stores and,
                # by every warp again, for the matrix units.
                tl.debug_barrier()
            square = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
            for k in tl.static_range(N):
                if SPREAD:
                    y = tl.load(out + (t * N + k)[:, None] * hidden + h, mask=mask, other=0.0)
                else:
                    y = tl.load(source + k * stream_stride + h, mask=mask, other=0.0)
                factor = fn + o[:, None] * (N * hidden) + k * hidden + h
                factor = tl.load(factor, mask=(o[:, None] < OUTPUTS) & (h < hidden), other=0.0)
                sums = _add_products(y, factor, sums)
                square += y.to(tl.float32) * y.to(tl.float32)
            squares += tl.sum(square, axis=1)
    if OUTPUTS > 0:
        sums = tl.where(o[None, :] == OUTPUTS, squares[:, None], sums)
        tl.store(partial + (part * num_tokens.to(tl.int64) + t)[:, None] * WIDTH + o, sums, mask=real[:, None])


@triton.jit
def _add_products(y, factor, sums):
    """sums + y factor^T with the precision of fp32, on matrix units that multiply bf16.

    An fp32 is the sum of three bf16, an fp16 of two, and the product of two bf16 is exact in fp32.
    """
    PIECES: tl.constexpr = 1 if y.dtype == tl.bfloat16 else 2 if y.dtype == tl.float16 else 3
    for _ in tl.static_range(PIECES):
        a, rest = y.to(tl.bfloat16), factor
        y = (y.to(tl.float32) - a.to(tl.float32)).to(y.dtype)
        for _ in tl.static_range(3):
            b = rest.to(tl.bfloat16)
            rest -= b.to(tl.float32)
            sums = tl.dot(a, tl.trans(b), sums)
    return sums


@triton.jit(do_not_specialize=["num_tokens", "groups", "parts"])
def _enter_sublayer(
    streams, token_stride, stream_stride, partial, scale, base, norm_weight, x, post, comb,
    num_tokens, groups, parts, hidden, norm_eps, hc_eps,
    N: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, ITERS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < groups:
        _coefficients(
            partial, scale, base, post, comb, program, num_tokens, parts, hidden, norm_eps, hc_eps,
            N, OUTPUTS, WIDTH, ITERS, BLOCK_P, BLOCK_N, BLOCK_S,
        )  # fmt: skip
    else:
        _sum_streams(
            streams, token_stride, stream_stride, partial, scale, base, norm_weight, x, (program - groups).to(tl.int64),
            num_tokens, parts, hidden, norm_eps, hc_eps, N, OUTPUTS, WIDTH, BLOCK_P, BLOCK_H,
        )  # fmt: skip


@triton.jit
def _sum_streams(
    streams, token_stride, stream_stride, partial, scale, base, norm_weight, x, t,
    num_tokens, parts, hidden, norm_eps, hc_eps,
    N: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """x of token `t`."""
    h = tl.arange(0, BLOCK_H)
    p = tl.arange(0, BLOCK_P)
    values = ()
    for i in tl.static_range(N):
        values += (tl.load(streams + t * token_stride + i * stream_stride + h, mask=h < hidden, other=0.0),)
    sums = partial + (p * num_tokens.to(tl.int64) + t) * WIDTH
    norm = tl.rsqrt(tl.sum(tl.load(sums + OUTPUTS, mask=p < parts, other=0.0)) / (N * hidden) + norm_eps)
    y = tl.zeros((BLOCK_H,), tl.float32)
    for i in tl.static_range(N):
        m = tl.sum(tl.load(sums + i, mask=p < parts, other=0.0)) * norm
        pre = tl.sigmoid(m * tl.load(scale) + tl.load(base + i)) + hc_eps
        y += pre * values[i].to(tl.float32)
    y = y.to(x.dtype.element_ty)
    if norm_weight is not None:
        z = y.to(tl.float32)
        z = z * tl.rsqrt(tl.sum(z * z) / hidden + norm_eps)
        z = tl.load(norm_weight + h, mask=h < hidden, other=0.0).to(tl.float32) * z
        y = z.to(x.dtype.element_ty)
    tl.store(x + t * hidden + h, y, mask=h < hidden)


@triton.jit
def _coefficients(
    partial, scale, base, post, comb, group, num_tokens, parts, hidden, norm_eps, hc_eps,
    N: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, ITERS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """post and comb of the `group`-th BLOCK_S tokens."""
    t = group.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    p = tl.arange(0, BLOCK_P)[:, None]
    sums = partial + (p * num_tokens.to(tl.int64) + t[None, :]) * WIDTH
    known, real = (p < parts) & (t < num_tokens)[None, :], (t < num_tokens)[:, None]
    norm = tl.sum(tl.load(sums + OUTPUTS, mask=known, other=0.0), axis=0)[:, None] / (N * hidden)
    norm = tl.rsqrt(norm + norm_eps)

    i = tl.arange(0, BLOCK_N)
    m = tl.sum(tl.load(sums[:, :, None] + (N + i), mask=known[:, :, None] & (i < N), other=0.0), axis=0) * norm
    m = 2 * tl.sigmoid(m * tl.load(scale + 1) + tl.load(base + N + i, mask=i < N, other=0.0))
    tl.store(post + t[:, None] * N + i, m, mask=real & (i < N))

    # All n x n in one dimension, to be loaded and stored side by side.
    i = tl.arange(0, BLOCK_N * BLOCK_N)
    at, inside = i // BLOCK_N * N + i % BLOCK_N, (i // BLOCK_N < N) & (i % BLOCK_N < N)
    m = tl.load(sums[:, :, None] + (2 * N + at), mask=known[:, :, None] & inside, other=0.0)
    m = tl.sum(m, axis=0) * norm * tl.load(scale + 2) + tl.load(base + 2 * N + at, mask=inside, other=0.0)
    # Columns beyond n weigh nothing in the softmax; rows beyond n must only not become NaN.
    m = tl.where(i % BLOCK_N < N, m, -float("inf")).reshape(BLOCK_S, BLOCK_N, BLOCK_N)
    m = tl.exp(m - tl.max(m, axis=2, keep_dims=True))
    m = m / tl.sum(m, axis=2, keep_dims=True) + hc_eps
    m = tl.where(inside.reshape(1, BLOCK_N, BLOCK_N), m, 0.0)
    j = tl.arange(0, BLOCK_N)
    row_eps = tl.where(j < N, hc_eps, 1.0)[None, :, None]
    column_eps = tl.where(j < N, hc_eps, 1.0)[None, None, :]
    m *= 1 / (tl.sum(m, axis=1, keep_dims=True) + column_eps)
    for _ in range(ITERS - 1):
        m *= 1 / (tl.sum(m, axis=2, keep_dims=True) + row_eps)
        m *= 1 / (tl.sum(m, axis=1, keep_dims=True) + column_eps)
    tl.store(comb + t[:, None] * (N * N) + at, m.reshape(BLOCK_S, BLOCK_N * BLOCK_N), mask=real & inside)
