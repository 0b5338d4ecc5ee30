"""The routed experts over packed weights (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .checks import check_shape
from .dispatch import implementation
from .packed_weight import Scheme


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
    """`fused_experts` with weights that stay packed; only the experts that some token chose are unpacked.

    Args:
        x: [T, H], floating.
        w13: canonical tensors of w1 and w3 of the E experts held here, each [E, 2, ...] (`ops/packed_weight.py`).
        w2: canonical tensors of w2, each [E, ...].
        scheme13, scheme2: how they are to be read.
        topk_weights: [T, K] fp32. topk_ids: [T, K] integer, global expert indices.
        swiglu_limit: the clamp, or None.
        first_expert: global index of the first expert held here.

    Returns:
        [T, H] fp32.
    """
    check_shape("topk_weights", topk_weights, (x.shape[0], None))
    check_shape("topk_ids", topk_ids, tuple(topk_weights.shape))
    return implementation("packed_experts", x.device)(
        x, w13, w2, scheme13, scheme2, topk_weights, topk_ids, swiglu_limit=swiglu_limit, first_expert=first_expert
    )
