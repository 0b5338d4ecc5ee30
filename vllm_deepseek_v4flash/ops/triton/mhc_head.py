from __future__ import annotations

import torch

from .mhc import enter_sublayer, mix_streams


def mhc_head(
    streams: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, *, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    streams, partial = mix_streams(streams, fn)
    return enter_sublayer(streams, partial, scale, base, None, norm_eps=norm_eps, hc_eps=hc_eps)[0]
