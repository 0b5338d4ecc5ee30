from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def merged_linear(
    x: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[torch.Tensor]:
    parts = F.linear(x.float(), weight.float()).split(list(sizes), dim=-1)
    return [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
