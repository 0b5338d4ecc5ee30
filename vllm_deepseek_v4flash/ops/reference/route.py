from __future__ import annotations

import torch
import torch.nn.functional as F


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
