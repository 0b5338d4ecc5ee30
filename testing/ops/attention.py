"""Attention over given rows in fp64."""

from __future__ import annotations

import math

import torch

from .numeric import FUNCTION, TINY, U32, U


def attend(
    q: torch.Tensor,
    rows: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax over scores [heads, rows] and sinks times the rows, and a bound on what rounding may move it."""
    scores = q @ rows.T * scale
    top = torch.cat((scores, sinks[:, None]), dim=1).amax(1)
    if not len(rows):
        return torch.zeros_like(q), torch.zeros_like(q)
    weights = (scores - top[:, None]).exp()
    total = weights.sum(1) + (sinks - top).exp()
    # An infinite sink leaves nothing; -inf - -inf cannot be, for there are rows.
    share = torch.where(sinks[:, None] == math.inf, 0.0, weights / total[:, None])
    # A score is a sum of products; an error of a score moves every weight relatively by as much, above and below
    # the line. exp of x errs by up to |x| * U32 more where it goes through exp2; the sum over the rows and one quotient
    # follow.
    size = (q.abs() @ rows.abs().T * scale).amax(1)
    reach = (scores - scores.amax(1, keepdim=True)).abs().amax(1) + torch.where(
        sinks.abs() < 1e30, (scores.amax(1) - sinks).abs(), 0.0
    )
    relative = 2 * ((q.shape[1] + 2) * U32 * size + reach * U32 + FUNCTION) + (len(rows) + 2) * U32
    # The shares sum to what the sink leaves, and no |k| is above the largest. Weights relative to the largest, which
    # is 1, may be rounded once more before they meet the rows.
    lost = share.sum(1) * (relative + (U[weights_dtype] if weights_dtype != torch.float32 else 0.0))
    lost += len(rows) * TINY[weights_dtype] * share.amax(1)
    return share @ rows, lost[:, None] * rows.abs().amax(0)
