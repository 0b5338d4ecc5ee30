"""The routed experts: gather, gate/up, clamped SwiGLU, down, weighted sum (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

import torch

from .checks import check_shape
from .dispatch import implementation


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
        topk_ids: [T, K] integer, global expert indices; those outside first_expert..first_expert+E-1 are another
            rank's.
        swiglu_limit: the clamp, or None.
        first_expert: global index of w13[0].

    Returns:
        [T, H] fp32.
    """
    check_shape("w13", w13, (None, None, x.shape[1]))
    check_shape("w2", w2, (w13.shape[0], x.shape[1], w13.shape[1] // 2))
    check_shape("topk_weights", topk_weights, (x.shape[0], None))
    check_shape("topk_ids", topk_ids, tuple(topk_weights.shape))
    return implementation("fused_experts", x.device)(
        x, w13, w2, topk_weights, topk_ids, swiglu_limit=swiglu_limit, first_expert=first_expert
    )
