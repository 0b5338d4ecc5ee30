"""Manifold-constrained hyper-connections, entering a sublayer (docs/model.md, "Hyper-connections")."""

from __future__ import annotations

import torch

from .checks import check_dtype, check_shape
from .dispatch import implementation


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
    """Mix the n residual streams into one sublayer input, and find how the output returns to them.

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
    _, n, hidden = streams.shape
    check_shape("fn", fn, ((2 + n) * n, n * hidden))
    check_shape("scale", scale, (3,))
    check_shape("base", base, ((2 + n) * n,))
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, (hidden,))
    for name, tensor in (("fn", fn), ("scale", scale), ("base", base)):
        check_dtype(name, tensor, torch.float32)
    if sinkhorn_iters < 1:
        raise ValueError(f"sinkhorn_iters must be at least 1, got {sinkhorn_iters}")
    return implementation("mhc_pre", streams.device)(
        streams, fn, scale, base, norm_weight, norm_eps=norm_eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters
    )
