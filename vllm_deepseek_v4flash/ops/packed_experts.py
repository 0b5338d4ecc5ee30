"""The routed experts over packed weights (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .checks import check_shape
from .dispatch import op
from .fused_experts import sum_over_experts
from .packed_linear import packed_linear
from .packed_weight import Scheme
from .swiglu import swiglu


def _check(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    check_shape("topk_weights", topk_weights, (x.shape[0], None))
    check_shape("topk_ids", topk_ids, topk_weights.shape)


@op(_check)
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
        scheme13, scheme2: how they are packed.
        topk_weights: [T, K] fp32. topk_ids: [T, K] integer, global expert indices.
        swiglu_limit: the clamp, or None.
        first_expert: global index of the first expert held here.

    Returns:
        [T, H] fp32.
    """

    def expert(rows: torch.Tensor, weights: torch.Tensor, index: int) -> torch.Tensor:
        w1, w3 = ({name: t[index, half] for name, t in w13.items()} for half in (0, 1))
        gate, up = (packed_linear.reference(rows, w, scheme13) for w in (w1, w3))
        activation = swiglu.reference(gate, up, swiglu_limit) * weights
        return packed_linear.reference(activation.to(x.dtype), {name: t[index] for name, t in w2.items()}, scheme2)

    return sum_over_experts(x, expert, w2["qweight"].shape[0], topk_weights, topk_ids, first_expert)
