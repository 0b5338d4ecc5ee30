"""Cosines and sines of rotary angles (docs/model.md, "RoPE")."""

from __future__ import annotations

import torch

from .dispatch import op


@op()
def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """The table that `apply_rope` takes: angles are the fp32 products that V4 was trained with.

    Args:
        positions: [T] integer.
        inv_freq: [R/2] fp32, radians per token.

    Returns:
        [T, R] fp32: cosines, then sines.
    """
    angles = positions[:, None].float() * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
