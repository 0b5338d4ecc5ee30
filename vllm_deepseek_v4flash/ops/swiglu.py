"""SwiGLU with V4's asymmetric clamp (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

import torch

from .checks import check_shape
from .dispatch import implementation


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)` in fp32: the gate is clamped from above only.

    Args:
        gate, up: [..., I], floating.
        limit: the clamp, or None for none.

    Returns:
        [..., I] fp32, for the caller to weigh before it rounds.
    """
    check_shape("up", up, tuple(gate.shape))
    return implementation("swiglu", gate.device)(gate, up, limit)
