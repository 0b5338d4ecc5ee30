from __future__ import annotations

import torch

from .mhc_post_pre import leave_and_enter


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
    _, x, post, comb = leave_and_enter(
        None, streams, None, None, fn, scale, base, norm_weight,
        norm_eps=norm_eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters,
    )  # fmt: skip
    return x, post, comb
