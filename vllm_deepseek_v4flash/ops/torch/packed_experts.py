from __future__ import annotations

from collections.abc import Mapping

import torch

from ..fused_experts import sum_over_experts
from ..packed_weight import Scheme
from ..swiglu import swiglu
from .packed_linear import packed_linear


def packed_experts(
    x: torch.Tensor,
    w13: Mapping[str, torch.Tensor],
    w2: Mapping[str, torch.Tensor],
    scheme13: Scheme,
    scheme2: Scheme,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    swiglu_limit: float | None,
    first_expert: int = 0,
) -> torch.Tensor:
    def expert(rows: torch.Tensor, weights: torch.Tensor, index: int) -> torch.Tensor:
        w1, w3 = ({name: t[index, half] for name, t in w13.items()} for half in (0, 1))
        activation = swiglu(packed_linear(rows, w1, scheme13), packed_linear(rows, w3, scheme13), swiglu_limit)
        return packed_linear((activation * weights).to(x.dtype), {name: t[index] for name, t in w2.items()}, scheme2)

    return sum_over_experts(x, expert, w2["qweight"].shape[0], topk_weights, topk_ids, first_expert)
