"""A linear over a packed weight: 4-bit integers, e2m1 or e4m3 blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .dispatch import implementation
from .packed_weight import Scheme


def packed_linear(x: torch.Tensor, weight: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """`x @ W.T` with W dequantised to the dtype of `x` on the way; W itself stays packed.

    Args:
        x: [T, K], floating; or [T, G, K], when group g meets the g-th of G equal row blocks of W only.
        weight: the canonical tensors of W [N, K] (`ops/packed_weight.py`).
        scheme: how they are to be read.

    Returns:
        [T, N], or [T, G, N / G]; the dtype of `x`.
    """
    rows = weight["qweight"].shape[0]
    if x.ndim == 3 and rows % x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} groups, which do not divide the weight's {rows} rows")
    return implementation("packed_linear", x.device)(x, weight, scheme)
