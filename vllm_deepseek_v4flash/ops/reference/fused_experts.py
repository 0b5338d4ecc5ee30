from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..swiglu import swiglu

GateUp = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
Down = Callable[[torch.Tensor, int], torch.Tensor]


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
    def gate_up(rows: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = F.linear(rows, w13[expert].to(x.dtype)).chunk(2, dim=-1)
        return gate, up

    def down(rows: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(rows, w2[expert].to(x.dtype))

    return sum_over_experts(
        x, gate_up, down, w13.shape[0], topk_weights, topk_ids, swiglu_limit=swiglu_limit, first_expert=first_expert
    )


def sum_over_experts(
    x: torch.Tensor,
    gate_up: GateUp,
    down: Down,
    num_experts: int,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    swiglu_limit: float | None,
    first_expert: int,
) -> torch.Tensor:
    """[T, H] fp32 from any form of expert weights, reached through the linears `gate_up` and `down` of one expert."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    local_ids = topk_ids - first_expert
    held = local_ids[(local_ids >= 0) & (local_ids < num_experts)]
    # Only experts that some token chose are read: a decode step touches the routed ones alone.
    for expert in held.unique().tolist():
        token, slot = (local_ids == expert).nonzero(as_tuple=True)
        gate, up = gate_up(x[token], expert)
        activation = swiglu(gate, up, swiglu_limit) * topk_weights[token, slot, None]
        out.index_add_(0, token, down(activation.to(x.dtype), expert).float())
    return out
