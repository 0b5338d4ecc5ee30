from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .linear_fp32 import linear_fp32


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    return [
        F.linear(x, weight) if weight.dtype == x.dtype == dtype != torch.float32 else linear_fp32(x, weight).to(dtype)
        for weight, dtype in zip(weights, dtypes, strict=True)
    ]
