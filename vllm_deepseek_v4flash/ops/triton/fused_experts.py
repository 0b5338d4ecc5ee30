from __future__ import annotations

import torch

from ..packed_weight import Scheme
from .experts import routed_experts
from .packed_weights import StoredWeight

_PLAIN = Scheme("plain")


def fused_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    swiglu_limit: float | None,
    first_expert: int = 0,
) -> torch.Tensor:
    halves = w13.unflatten(1, (2, w2.shape[2]))
    return routed_experts(
        x, StoredWeight.of({"weight": halves}, _PLAIN), StoredWeight.of({"weight": w2}, _PLAIN), w2.shape[0],
        topk_weights, topk_ids, swiglu_limit=swiglu_limit, first_expert=first_expert,
    )  # fmt: skip
