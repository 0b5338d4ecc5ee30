"""Expert selection: square-root softplus scores, biased top-k or a hash table (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

import torch

from .checks import check_dtype, check_shape
from .dispatch import implementation


def route(
    logits: torch.Tensor,
    topk: int,
    *,
    bias: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    scaling: float,
    renormalize: bool = True,
    shared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `topk` experts per token and weigh them.

    Scores are `sqrt(softplus(logits))`. The bias takes part in the choice only; weights come from the scores without
    it, divided by their sum and multiplied by `scaling`, in hash layers too. Equal biased scores go to the smaller
    expert index.

    Args:
        logits: [T, E] fp32.
        topk: experts per token, at most E.
        bias: [E] fp32 selection bias, or None.
        expert_ids: [T, topk] integer, the hash layers' choice, or None for the top-k. Exactly one of the two rules
            applies.
        scaling: `routed_scaling_factor`.
        renormalize: `norm_topk_prob`.
        shared: list in one more column the expert that every token visits, number E, with weight 1.

    Returns:
        weights [T, K] fp32 and expert indices [T, K] int64; K is topk, or with `shared` one more.
    """
    check_dtype("logits", logits, torch.float32)
    if not 0 < topk <= logits.shape[1]:
        raise ValueError(f"topk must be in 1..{logits.shape[1]} (the experts), got {topk}")
    if expert_ids is not None:
        check_shape("expert_ids", expert_ids, (logits.shape[0], topk))
    if bias is not None:
        check_shape("bias", bias, (logits.shape[1],))
    return implementation("route", logits.device)(
        logits, topk, bias=bias, expert_ids=expert_ids, scaling=scaling, renormalize=renormalize, shared=shared
    )
