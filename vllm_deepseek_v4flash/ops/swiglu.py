"""SwiGLU with V4's asymmetric clamp (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import check_shape
from .dispatch import op


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    check_shape("up", up, gate.shape)


@op(_check)
def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)` in fp32: the gate is clamped from above only.

    Args:
        gate, up: [..., I], floating.
        limit: the clamp, or None for none.

    Returns:
        [..., I] fp32, for the caller to weight before it rounds.
    """
    gate, up = gate.float(), up.float()
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return F.silu(gate) * up
