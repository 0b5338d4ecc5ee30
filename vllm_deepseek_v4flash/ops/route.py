"""Expert selection: square-root softplus scores, biased top-k or a hash table (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import check_dtype, check_shape
from .dispatch import op


def _check(logits: torch.Tensor, topk: int, bias: torch.Tensor | None, expert_ids: torch.Tensor | None) -> None:
    check_dtype(torch.float32, logits=logits)
    num_tokens, num_experts = logits.shape
    if not 0 < topk <= num_experts:
        raise ValueError(f"topk must be in 1..{num_experts} (the experts), got {topk}")
    if expert_ids is not None:
        check_shape("expert_ids", expert_ids, (num_tokens, topk))
    if bias is not None:
        check_shape("bias", bias, (num_experts,))


@op(_check)
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
    """Choose `topk` experts per token and weight them.

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
    scores = F.softplus(logits).sqrt()
    if expert_ids is None:
        choice = scores if bias is None else scores + bias.float()
        # A stable sort rather than topk: torch.topk leaves the order of ties open.
        expert_ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    expert_ids = expert_ids.long()
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * scaling
    if shared:
        weights, expert_ids = F.pad(weights, (0, 1), value=1.0), F.pad(expert_ids, (0, 1), value=logits.shape[1])
    return weights, expert_ids
