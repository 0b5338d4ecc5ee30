"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`, computed in fp32 and cast once (docs/model.md, "RMSNorm")."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] to [..., dim], same dtype."""
        return rms_norm(x, self.weight, self.eps)
