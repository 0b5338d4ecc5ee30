"""Manifold-constrained hyper-connections in two launches (docs/model.md, "Hyper-connections").

`mix_streams` goes over the streams once: it spreads a sublayer's output over them and multiplies the result with the
next sublayer's `fn`, in adjacent parts of the hidden dimension. `enter_sublayer` adds up the parts and goes over the
tokens: their weights, and the weighted sums of their streams.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Pointer, block, device_of, launch, strided

_SUMS = 4096  # partial sums that one program of `enter_sublayer` holds at a time


class Streams(NamedTuple):
    """[T, n, H] with contiguous rows of H; strides in elements."""

    data: Pointer
    token_stride: int
    stream_stride: int


class Sublayer(NamedTuple):
    """What a sublayer gives back to the streams; post and comb are None if there is no such sublayer."""

    x: Pointer
    """[T, H]"""
    x_stride: int
    post: Pointer | None
    """[T, n] fp32"""
    comb: Pointer | None
    """[T, n, n] fp32"""


class Mixing(NamedTuple):
    """How the streams are mixed on the way into a sublayer."""

    partial: Pointer
    """[parts, T, WIDTH] fp32: products with `fn`, then the sum of squares in column OUTPUTS."""
    scale: Pointer
    base: Pointer
    norm_eps: float
    hc_eps: float


class Entered(NamedTuple):
    """What goes into a sublayer, and what its output will be spread by."""

    x: Pointer
    """[T, H]"""
    post: Pointer
    """[T, n] fp32"""
    comb: Pointer
    """[T, n, n] fp32"""


class Blocks(NamedTuple):
    """Powers of two, for which `enter_sublayer`'s kernel is compiled."""

    p: int
    """That holds the parts."""
    n: int
    """That holds the streams."""
    s: int
    """Tokens of a program that computes coefficients."""
    h: int
    """That holds the hidden dimension."""


class Shape(NamedTuple):
    """Of the streams and the products, for which kernels are compiled."""

    n: int
    """Streams."""
    outputs: int
    """Rows of `fn`."""
    width: int
    """Columns of the partial products: at least `outputs` + 1."""


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
    source = _streams(streams)
    if sublayer is None:
        out, given = source.data, Sublayer(source.data, source.token_stride, None, None)
    else:
        out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
        given = Sublayer(*strided(sublayer[0]), sublayer[1].contiguous(), sublayer[2].contiguous())
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
        source, given, out, None if fn is None else fn.contiguous(), partial, num_tokens, hidden, steps,
        SHAPE=Shape(n, outputs, width), BLOCK_T=block_t, BLOCK_H=block_h,
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
    # Sinkhorn's many short steps run alongside the sums, as programs of their own, which start first.
    groups = triton.cdiv(num_tokens, block_s) if sinkhorn_iters else 0
    launch(
        _enter_sublayer, (groups + num_tokens,),
        Streams(streams, streams.stride(0), streams.stride(1)), Mixing(partial, scale, base, norm_eps, hc_eps),
        None if norm_weight is None else norm_weight.contiguous(), Entered(x, post, comb),
        num_tokens, groups, parts, hidden,
        SHAPE=Shape(n, base.shape[0], width), ITERS=sinkhorn_iters, BLOCKS=Blocks(block_p, block_n, block_s, block_h),
        num_warps=min(8, max(1, block_h // 512)), maxnreg=128,
    )  # fmt: skip
    return x, post, comb


def _streams(x: torch.Tensor) -> Streams:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Streams(x, x.stride(0), x.stride(1))


@triton.jit(do_not_specialize=["num_tokens", "steps"])
def _mix_streams(
    streams: Streams, sublayer: Sublayer, out, fn, partial, num_tokens, hidden, steps,
    SHAPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = SHAPE.n
    WIDTH: tl.constexpr = SHAPE.width
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    real = t < num_tokens
    o = tl.arange(0, WIDTH)
    source = streams.data + (t * streams.token_stride)[:, None]
    if sublayer.post is not None:
        posts, combs = (), ()
        for k in tl.static_range(N):
            posts += (tl.load(sublayer.post + t * N + k, mask=real, other=0.0)[:, None],)  # [BLOCK_T]
            for j in tl.static_range(N):
                combs += (tl.load(sublayer.comb + (t * N + j) * N + k, mask=real, other=0.0)[:, None],)  # [BLOCK_T]
    sums, squares = tl.zeros((BLOCK_T, WIDTH), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for step in range(steps):
        h = ((part * steps + step) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
        mask = real[:, None] & (h < hidden)
        if sublayer.post is not None:
            _spread(source, streams.stream_stride, sublayer, posts, combs, out, t, h, mask, hidden, N)
            if SHAPE.outputs > 0:
                # The streams are read back below. Kept in registers, they would be mixed twice: for the stores and,
                # by every warp again, for the matrix units.
                tl.debug_barrier()
        if SHAPE.outputs > 0:
            # partial[part] = out[:, :, h].flatten(1) @ fn[:, :, h].flatten(1).T
            square = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
            for k in tl.static_range(N):
                if sublayer.post is not None:
                    y = tl.load(out + (t * N + k)[:, None] * hidden + h, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_H]
                else:
                    y = tl.load(source + k * streams.stream_stride + h, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_H]
                factor, known = fn + o[:, None] * (N * hidden) + k * hidden + h, o[:, None] < SHAPE.outputs
                factor = tl.load(factor, mask=known & (h < hidden), other=0.0)  # [WIDTH, BLOCK_H]
                sums = _add_products(y, factor, sums)
                square += y.to(tl.float32) * y.to(tl.float32)
            squares += tl.sum(square, axis=1)
    if SHAPE.outputs > 0:
        # partial[part, :, OUTPUTS] = out[:, :, h].square().sum((1, 2))
        sums = tl.where(o[None, :] == SHAPE.outputs, squares[:, None], sums)
        at = partial + (part * num_tokens.to(tl.int64) + t)[:, None] * WIDTH + o
        tl.store(at, sums, mask=real[:, None])  # [BLOCK_T, WIDTH]


@triton.jit
def _spread(source, stride, sublayer: Sublayer, posts, combs, out, t, h, mask, hidden, N: tl.constexpr):
    """out = post[..., None] * x[:, None] + torch.einsum("tjk,tjh->tkh", comb, streams), of tokens t and columns h."""
    values = ()
    for k in tl.static_range(N):
        values += (tl.load(source + k * stride + h, mask=mask, other=0.0),)  # [BLOCK_T, BLOCK_H]
    x = sublayer.x + (t * sublayer.x_stride)[:, None] + h
    output = tl.load(x, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H]
    for k in tl.static_range(N):
        mixed = posts[k] * output
        for j in tl.static_range(N):
            mixed += combs[k * N + j] * values[j].to(tl.float32)
        at = out + (t * N + k)[:, None] * hidden + h
        tl.store(at, mixed.to(out.dtype.element_ty), mask=mask)  # [BLOCK_T, BLOCK_H]


@triton.jit
def _add_products(y, factor, sums):
    """sums + y @ factor.T with the precision of fp32, on matrix units that multiply bf16.

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
    streams: Streams, mixing: Mixing, norm_weight, entered: Entered, num_tokens, groups, parts, hidden,
    SHAPE: tl.constexpr, ITERS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < groups:
        _coefficients(mixing, entered, program, num_tokens, parts, hidden, SHAPE, ITERS, BLOCKS)
    else:
        t = (program - groups).to(tl.int64)
        _sum_streams(streams, mixing, norm_weight, entered.x, t, num_tokens, parts, hidden, SHAPE, BLOCKS)


@triton.jit
def _sum_streams(
    streams: Streams, mixing: Mixing, norm_weight, x, t, num_tokens, parts, hidden,
    SHAPE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """x of token `t`."""
    BLOCK_P: tl.constexpr = BLOCKS.p
    BLOCK_H: tl.constexpr = BLOCKS.h
    N: tl.constexpr = SHAPE.n
    h = tl.arange(0, BLOCK_H)
    p = tl.arange(0, BLOCK_P)
    values = ()
    for i in tl.static_range(N):
        at = streams.data + t * streams.token_stride + i * streams.stream_stride + h
        values += (tl.load(at, mask=h < hidden, other=0.0),)  # [BLOCK_H]
    # norm = torch.rsqrt(streams.flatten(1).square().mean(-1) + norm_eps)
    sums = mixing.partial + (p * num_tokens.to(tl.int64) + t) * SHAPE.width
    squares = tl.sum(tl.load(sums + SHAPE.outputs, mask=p < parts, other=0.0))  # [BLOCK_P]
    norm = tl.rsqrt(squares / (N * hidden) + mixing.norm_eps)
    # pre = torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + hc_eps; y = (pre[..., None] * streams).sum(1)
    y = tl.zeros((BLOCK_H,), tl.float32)
    for i in tl.static_range(N):
        m = tl.sum(tl.load(sums + i, mask=p < parts, other=0.0)) * norm  # [BLOCK_P]
        pre = tl.sigmoid(m * tl.load(mixing.scale) + tl.load(mixing.base + i)) + mixing.hc_eps
        y += pre * values[i].to(tl.float32)
    y = y.to(x.dtype.element_ty)
    # y = rms_norm(y, norm_weight, norm_eps)
    if norm_weight is not None:
        z = y.to(tl.float32)
        z = z * tl.rsqrt(tl.sum(z * z) / hidden + mixing.norm_eps)
        z = tl.load(norm_weight + h, mask=h < hidden, other=0.0).to(tl.float32) * z  # [BLOCK_H]
        y = z.to(x.dtype.element_ty)
    tl.store(x + t * hidden + h, y, mask=h < hidden)  # [BLOCK_H]


@triton.jit
def _coefficients(
    mixing: Mixing, entered: Entered, group, num_tokens, parts, hidden,
    SHAPE: tl.constexpr, ITERS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """post and comb of the `group`-th tokens, of which there are `BLOCKS.s`."""
    BLOCK_P: tl.constexpr = BLOCKS.p
    BLOCK_N: tl.constexpr = BLOCKS.n
    BLOCK_S: tl.constexpr = BLOCKS.s
    N: tl.constexpr = SHAPE.n
    t = group.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    p = tl.arange(0, BLOCK_P)[:, None]
    sums = mixing.partial + (p * num_tokens.to(tl.int64) + t[None, :]) * SHAPE.width
    known, real = (p < parts) & (t < num_tokens)[None, :], (t < num_tokens)[:, None]
    # norm = torch.rsqrt(streams.flatten(1).square().mean(-1, keepdim=True) + norm_eps)
    squares = tl.load(sums + SHAPE.outputs, mask=known, other=0.0)  # [BLOCK_P, BLOCK_S]
    norm = tl.sum(squares, axis=0)[:, None] / (N * hidden)
    norm = tl.rsqrt(norm + mixing.norm_eps)

    # post = 2 * torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    i = tl.arange(0, BLOCK_N)
    m = tl.load(sums[:, :, None] + (N + i), mask=known[:, :, None] & (i < N), other=0.0)  # [BLOCK_P, BLOCK_S, BLOCK_N]
    m = tl.sum(m, axis=0) * norm
    bias = tl.load(mixing.base + N + i, mask=i < N, other=0.0)  # [BLOCK_N]
    m = 2 * tl.sigmoid(m * tl.load(mixing.scale + 1) + bias)
    tl.store(entered.post + t[:, None] * N + i, m, mask=real & (i < N))  # [BLOCK_S, BLOCK_N]

    # comb = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(1, (n, n))
    # All n x n are in one dimension, to be loaded and stored as neighbours.
    i = tl.arange(0, BLOCK_N * BLOCK_N)
    at, inside = i // BLOCK_N * N + i % BLOCK_N, (i // BLOCK_N < N) & (i % BLOCK_N < N)
    mask = known[:, :, None] & inside
    m = tl.load(sums[:, :, None] + (2 * N + at), mask=mask, other=0.0)  # [BLOCK_P, BLOCK_S, BLOCK_N * BLOCK_N]
    bias = tl.load(mixing.base + 2 * N + at, mask=inside, other=0.0)  # [BLOCK_N * BLOCK_N]
    m = tl.sum(m, axis=0) * norm * tl.load(mixing.scale + 2) + bias
    # Columns beyond n weigh nothing in the softmax; rows beyond n must only not become NaN.
    m = tl.where(i % BLOCK_N < N, m, -float("inf")).reshape(BLOCK_S, BLOCK_N, BLOCK_N)
    m = _sinkhorn(m, inside.reshape(1, BLOCK_N, BLOCK_N), mixing.hc_eps, N, ITERS, BLOCK_N)
    m = m.reshape(BLOCK_S, BLOCK_N * BLOCK_N)
    tl.store(entered.comb + t[:, None] * (N * N) + at, m, mask=real & inside)  # [BLOCK_S, BLOCK_N * BLOCK_N]


@triton.jit
def _sinkhorn(m, inside, hc_eps, N: tl.constexpr, ITERS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Logits [BLOCK_S, BLOCK_N, BLOCK_N] to nearly doubly stochastic matrices; zero outside N x N."""
    # m = m.softmax(-1) + hc_eps
    m = tl.exp(m - tl.max(m, axis=2, keep_dims=True))
    m = m / tl.sum(m, axis=2, keep_dims=True) + hc_eps
    m = tl.where(inside, m, 0.0)
    j = tl.arange(0, BLOCK_N)
    row_eps = tl.where(j < N, hc_eps, 1.0)[None, :, None]
    column_eps = tl.where(j < N, hc_eps, 1.0)[None, None, :]
    # m = m / (m.sum(-2, keepdim=True) + hc_eps)
    m *= 1 / (tl.sum(m, axis=1, keep_dims=True) + column_eps)
    for _ in range(ITERS - 1):
        # m = m / (m.sum(-1, keepdim=True) + hc_eps); m = m / (m.sum(-2, keepdim=True) + hc_eps)
        m *= 1 / (tl.sum(m, axis=2, keep_dims=True) + row_eps)
        m *= 1 / (tl.sum(m, axis=1, keep_dims=True) + column_eps)
    return m
