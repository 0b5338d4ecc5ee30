from __future__ import annotations

import torch

from .mhc_pre import mhc_mixes


def mhc_head(
    streams: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, *, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    pre = torch.sigmoid(mhc_mixes(streams, fn, norm_eps) * scale + base) + hc_eps
    return (pre[..., None] * streams.float()).sum(1).to(streams.dtype)
