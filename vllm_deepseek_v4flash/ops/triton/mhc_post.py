from __future__ import annotations

import torch

from .mhc import mix_streams


def mhc_post(x: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    return mix_streams(streams, None, (x, post, comb))[0]
