from __future__ import annotations

from collections.abc import Mapping

import torch

from ..packed_weight import Scheme
from .experts import routed_experts
from .packed_weights import StoredWeight


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
    return routed_experts(
        x, StoredWeight.of(w13, scheme13), StoredWeight.of(w2, scheme2), w2["qweight"].shape[0],
        topk_weights, topk_ids, swiglu_limit=swiglu_limit, first_expert=first_expert,
    )  # fmt: skip
