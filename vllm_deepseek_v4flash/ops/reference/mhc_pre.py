from __future__ import annotations

import torch
import torch.nn.functional as F

from ..rms_norm import rms_norm


def mhc_mixes(streams: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """[T, n, H] streams to [T, len(fn)] fp32: the weightless norm is applied to the product, which is the same."""
    flat = streams.flatten(1).float()
    return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


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
    n = streams.shape[1]
    mixes = mhc_mixes(streams, fn, norm_eps)
    pre = torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn((mixes[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(1, (n, n)), hc_eps, sinkhorn_iters)
    x = (pre[..., None] * streams.float()).sum(1).to(streams.dtype)
    return x if norm_weight is None else rms_norm(x, norm_weight, norm_eps), post, comb


def sinkhorn(logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    """[T, n, n] logits to nearly doubly stochastic matrices; the first row step is the softmax."""
    comb = logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb
