"""Interleaved rotary embedding of the last dimensions of a head (docs/model.md, "RoPE")."""

from __future__ import annotations

import torch

from .checks import check_cos_sin
from .dispatch import implementation


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Rotate the pairs (2k, 2k+1) of the last R dimensions of every head; the others pass through.

    Args:
        x: [T, D] or [T, H, D], floating.
        cos_sin: [T, R] fp32: the R/2 cosines of each token's position, then its R/2 sines.
        inverse: rotate back, as the attention output needs.

    Returns:
        The shape and dtype of `x`; the rotation itself is fp32.
    """
    check_cos_sin(cos_sin, x.shape[0], x.shape[-1])
    return implementation("apply_rope", x.device)(x, cos_sin, inverse=inverse)
