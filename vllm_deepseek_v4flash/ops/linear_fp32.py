"""A linear whose result stays fp32: router, compressor (docs/model.md, "Kept in fp32")."""

from __future__ import annotations

import torch

from .checks import check_shape
from .dispatch import implementation


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`fp32(x) @ fp32(weight).T` without rounding the result to the model's dtype.

    Args:
        x: [T, K], floating.
        weight: [N, K], floating.

    Returns:
        [T, N] fp32.
    """
    check_shape("weight", weight, (None, x.shape[-1]))
    return implementation("linear_fp32", x.device)(x, weight)
