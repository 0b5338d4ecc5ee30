from __future__ import annotations

import torch
import torch.nn.functional as F

from ..swiglu import swiglu


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
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    local_ids = topk_ids - first_expert
    held = local_ids[(local_ids >= 0) & (local_ids < w13.shape[0])]
    # Only experts that some token chose are read: a decode step touches the routed ones alone.
    for expert in held.unique().tolist():
        token, slot = (local_ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], w13[expert]).chunk(2, dim=-1)
        activation = swiglu(gate, up, swiglu_limit) * topk_weights[token, slot, None]
        out.index_add_(0, token, F.linear(activation.to(x.dtype), w2[expert]).float())
    return out
