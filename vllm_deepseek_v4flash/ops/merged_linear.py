"""Several linears of one input, whose weights are stored as one (docs/model.md, "Attention", "Mixture of experts")."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checks import check_shape
from .dispatch import op
from .linear_fp32 import linear_fp32


def _check(x: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    check_shape("weight", weight, (sum(sizes), x.shape[-1]))
    if len(sizes) != len(dtypes):
        raise ValueError(f"sizes has {len(sizes)} parts, dtypes {len(dtypes)}: every part needs a dtype")


@op(_check)
def merged_linear(
    x: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[torch.Tensor]:
    """`x @ weight.T`, summed in fp32 or better, split by columns; each part is rounded once to its own dtype.

    Args:
        x: [T, K], floating.
        weight: [N, K], floating.
        sizes: N_i of each part; they add up to N.
        dtypes: of each part: that of `x`, or fp32.

    Returns:
        [T, N_i] each; values of a row are contiguous, rows may be strided.
    """
    parts = linear_fp32.reference(x, weight).split(list(sizes), dim=-1)
    return [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
