from __future__ import annotations

import torch

from .merged_linear import merged_linear


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return merged_linear(x, weight, (weight.shape[0],), (torch.float32,))[0]
