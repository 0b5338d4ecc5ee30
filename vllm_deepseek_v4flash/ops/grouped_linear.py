"""A block-diagonal linear: the first half of V4's output projection (docs/model.md, "Attention")."""

from __future__ import annotations

import torch

from .checks import check_shape
from .dispatch import op


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    check_shape("weight", weight, (None, x.shape[2]))
    if weight.shape[0] % x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} groups, which do not divide the weight's {weight.shape[0]} rows")


@op(_check)
def grouped_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Group g of the input is multiplied by the g-th of G equal row blocks of the weight.

    Args:
        x: [T, G, K], floating.
        weight: [G * N, K], the dtype of `x` or a narrower one.

    Returns:
        [T, G, N], the dtype of `x`.
    """
    by_group = weight.float().unflatten(0, (x.shape[1], -1))
    return torch.einsum("tgk,gnk->tgn", x.float(), by_group).to(x.dtype)
