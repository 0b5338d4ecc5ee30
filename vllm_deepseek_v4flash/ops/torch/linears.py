from __future__ import annotations

from collections.abc import Sequence

import torch

from .merged_linear import multiply


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    return [multiply(x, weight, dtype) for weight, dtype in zip(weights, dtypes, strict=True)]
