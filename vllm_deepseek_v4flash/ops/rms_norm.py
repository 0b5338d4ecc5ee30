"""RMSNorm with the weight product in fp32 (docs/model.md, "RMSNorm")."""

from __future__ import annotations

import torch

from .checks import check_shape
from .dispatch import implementation


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`w * x * rsqrt(mean(x^2) + eps)` over the last dimension, computed in fp32 and cast once at the end.

    Args:
        x: [..., D], floating.
        weight: [D], floating, or None for the weightless norm of the query heads.
        eps: added to the mean of squares.

    Returns:
        [..., D], the dtype of `x`.
    """
    if weight is not None:
        check_shape("weight", weight, (x.shape[-1],))
    return implementation("rms_norm", x.device)(x, weight, eps)
