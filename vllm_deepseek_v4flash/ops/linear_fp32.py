"""A linear whose result stays fp32: router, compressor (docs/model.md, "Kept in fp32")."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import check_shape
from .dispatch import op


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    check_shape("weight", weight, (None, x.shape[-1]))


@op(_check)
def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`fp32(x) @ fp32(weight).T` without rounding the result to the model's dtype.

    Args:
        x: [T, K], floating.
        weight: [N, K], floating.

    Returns:
        [T, N] fp32.
    """
    return F.linear(x.float(), weight.float())
