"""Several linears of one input (docs/model.md, "Attention" and "Mixture of experts")."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checks import check_shape
from .dispatch import op
from .linear_fp32 import linear_fp32


def _check(x: torch.Tensor, weights: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> None:
    for i, weight in enumerate(weights):
        check_shape(f"weights[{i}]", weight, (None, x.shape[-1]))
    if len(weights) != len(dtypes):
        raise ValueError(f"{len(weights)} weights need as many dtypes, got {len(dtypes)}")


@op(_check)
def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """`x @ w.T` for every weight `w`, summed in fp32 or better and rounded once to the dtype of the same place.

    Args:
        x: [T, K], floating.
        weights: [N_i, K] each, floating.
        dtypes: of the results: that of `x`, or fp32.

    Returns:
        [T, N_i] each.
    """
    return [linear_fp32.reference(x, weight).to(dtype) for weight, dtype in zip(weights, dtypes, strict=True)]
