"""A linear over a packed weight: 4-bit integers, e2m1 or e4m3 blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .dispatch import op
from .packed_weight import Scheme, dequantise


def _check(x: torch.Tensor, weight: Mapping[str, torch.Tensor]) -> None:
    rows = weight["qweight"].shape[0]
    if x.ndim == 3 and rows % x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} groups, which do not divide the weight's {rows} rows")


@op(_check)
def packed_linear(x: torch.Tensor, weight: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """`x @ W.T` with W dequantised to the dtype of `x` on the way; W itself stays packed.

    Args:
        x: [T, K], floating; or [T, G, K], where group g is multiplied by the g-th of G equal row blocks of W only.
        weight: the canonical tensors of W [N, K] (`ops/packed_weight.py`).
        scheme: how W is packed.

    Returns:
        [T, N], or [T, G, N / G]; the dtype of `x`.
    """
    values = dequantise(weight, scheme).to(x.dtype)
    if x.ndim == 2:
        return F.linear(x, values)
    return torch.einsum("tgk,gnk->tgn", x, values.unflatten(0, (x.shape[1], -1)))
