"""RMSNorm with the weight product in fp32 (docs/model.md, "RMSNorm")."""

from __future__ import annotations

import torch

from .checks import check_shape
from .dispatch import op


def _check(x: torch.Tensor, weight: torch.Tensor | None) -> None:
    if weight is not None:
        check_shape("weight", weight, (x.shape[-1],))


@op(_check)
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`w * x * rsqrt(mean(x^2) + eps)` over the last dimension, computed in fp32 and cast once at the end.

    Args:
        x: [..., D], floating.
        weight: [D], floating, or None for the weightless norm of the query heads.
        eps: added to the mean of squares.

    Returns:
        [..., D], the dtype of `x`.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = weight.float() * y
    return y.to(x.dtype)
