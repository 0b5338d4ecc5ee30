"""Manifold-constrained hyper-connections, entering a sublayer (docs/model.md, "Hyper-connections")."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import check_dtype, check_shape
from .dispatch import op
from .rms_norm import rms_norm


def check_mhc_pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_weight: torch.Tensor | None,
    sinkhorn_iters: int,
) -> None:
    _, n, hidden = streams.shape
    check_shape("fn", fn, ((2 + n) * n, n * hidden))
    check_shape("scale", scale, (3,))
    check_shape("base", base, ((2 + n) * n,))
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, (hidden,))
    check_dtype(torch.float32, fn=fn, scale=scale, base=base)
    if sinkhorn_iters < 1:
        raise ValueError(f"sinkhorn_iters must be at least 1, got {sinkhorn_iters}")


@op(check_mhc_pre)
def mhc_pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix the n residual streams into one sublayer input, and compute how the output returns to them.

    With m = (X fn^T) rsqrt(mean(X^2) + norm_eps) over the flattened streams X, all in fp32:
    `pre = sigmoid(m[:n] scale[0] + base[:n]) + hc_eps`, `post = 2 sigmoid(m[n:2n] scale[1] + base[n:2n])`, and `comb`
    is `m[2n:] scale[2] + base[2n:]` as an n x n matrix, made doubly stochastic by Sinkhorn: softmax over its last
    dimension plus hc_eps, a column step, then sinkhorn_iters - 1 row and column steps.

    Args:
        streams: [T, n, H], floating.
        fn: [(2 + n) n, n H] fp32.
        scale: [3] fp32.
        base: [(2 + n) n] fp32.
        norm_weight: [H], the sublayer's RMSNorm, applied to its input; None for none.
        norm_eps: `rms_norm_eps`, of both norms.
        hc_eps: added to `pre`, and in every Sinkhorn denominator.
        sinkhorn_iters: at least 1.

    Returns:
        x [T, H] in the dtype of `streams`, post [T, n] fp32, comb [T, n, n] fp32 indexed [source, destination].
    """
    n = streams.shape[1]
    mixes = mhc_mixes(streams, fn, norm_eps)
    pre = torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn((mixes[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(1, (n, n)), hc_eps, sinkhorn_iters)
    x = (pre[..., None] * streams.float()).sum(1).to(streams.dtype)
    return x if norm_weight is None else rms_norm.reference(x, norm_weight, norm_eps), post, comb


def mhc_mixes(streams: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """[T, n, H] streams to [T, len(fn)] fp32: the weightless norm is applied to the product, which is the same."""
    flat = streams.flatten(1).float()
    return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def sinkhorn(logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    """[T, n, n] logits to nearly doubly stochastic matrices; the first row step is the softmax."""
    comb = logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb
