"""The routed experts: gate, up, clamped SwiGLU, down, weighted sum (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .checks import check_shape
from .dispatch import op
from .swiglu import swiglu


def _check(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> None:
    check_shape("w13", w13, (None, None, x.shape[1]))
    check_shape("w2", w2, (w13.shape[0], x.shape[1], w13.shape[1] // 2))
    check_shape("topk_weights", topk_weights, (x.shape[0], None))
    check_shape("topk_ids", topk_ids, topk_weights.shape)


@op(_check)
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
    """Sum over each token's experts of `w2 (weight * swiglu(w1 x, w3 x))`.

    The routing weight multiplies the activation before `w2`, in fp32, as in DeepSeek's reference; the product is
    rounded to the dtype of `x` once, and the experts are summed in fp32.

    Args:
        x: [T, H], floating.
        w13: [E, 2I, H]: w1 (gate) rows, then w3 (up) rows of the E experts held here.
        w2: [E, H, I].
        topk_weights: [T, K] fp32.
        topk_ids: [T, K] integer, global expert indices; those outside first_expert..first_expert+E-1 belong to other
            ranks.
        swiglu_limit: the clamp, or None.
        first_expert: global index of w13[0].

    Returns:
        [T, H] fp32.
    """

    def expert(rows: torch.Tensor, weights: torch.Tensor, index: int) -> torch.Tensor:
        gate, up = F.linear(rows, w13[index].to(x.dtype)).chunk(2, dim=-1)
        activation = swiglu.reference(gate, up, swiglu_limit) * weights
        return F.linear(activation.to(x.dtype), w2[index].to(x.dtype))

    return sum_over_experts(x, expert, w13.shape[0], topk_weights, topk_ids, first_expert)


def sum_over_experts(
    x: torch.Tensor,
    expert: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    num_experts: int,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    first_expert: int,
) -> torch.Tensor:
    """[T, H] fp32 from any form of expert weights.

    Args:
        expert: called with its tokens' rows [N, H], their routing weights [N, 1] and the local index of an expert,
            returns that expert's weighted output [N, H]. It is not called for experts that no token chose.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    local_ids = topk_ids - first_expert
    held = local_ids[(local_ids >= 0) & (local_ids < num_experts)]
    for index in held.unique().tolist():
        token, slot = (local_ids == index).nonzero(as_tuple=True)
        out.index_add_(0, token, expert(x[token], topk_weights[token, slot, None], index).float())
    return out
