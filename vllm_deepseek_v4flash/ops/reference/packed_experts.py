from __future__ import annotations

from collections.abc import Mapping

import torch

from ..packed_weight import Scheme
from .fused_experts import sum_over_experts
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
    def gate_up(rows: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ({name: t[expert, half] for name, t in w13.items()} for half in (0, 1))
        return packed_linear(rows, gate, scheme13), packed_linear(rows, up, scheme13)

    def down(rows: torch.Tensor, expert: int) -> torch.Tensor:
        return packed_linear(rows, {name: t[expert] for name, t in w2.items()}, scheme2)

    return sum_over_experts(
        x, gate_up, down, w2["qweight"].shape[0], topk_weights, topk_ids, swiglu_limit=swiglu_limit,
        first_expert=first_expert,
    )  # fmt: skip
