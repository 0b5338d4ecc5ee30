from __future__ import annotations

import math

import numpy as np
import torch

from . import threads
from .arithmetic import ONE, ZERO
from .compiling import helper, kernel
from .memory import get, get_i64, integer, packed, put, put_i64

_LINEAR = np.float32(20.0)
"""Above it softplus(x) is x in fp32."""


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
    num_tokens, experts = logits.shape
    if bias is not None:
        bias = bias.float()
    logits, bias, expert_ids = packed(logits, bias, expert_ids)
    weights = torch.empty((num_tokens, topk + shared))
    chosen = torch.empty((num_tokens, topk + shared), dtype=torch.int64)
    threads.run(
        _route, num_tokens, float(num_tokens * experts * (topk + 20)), 2 * experts,
        logits.data_ptr(), experts, topk, 0 if bias is None else bias.data_ptr(),
        0 if expert_ids is None else expert_ids.data_ptr(), expert_ids is not None and expert_ids.element_size() == 8,
        scaling, renormalize, shared, weights.data_ptr(), chosen.data_ptr(),
    )  # fmt: skip
    return weights, chosen


@helper
def _better(a, b):
    """Whether `a` ranks before `b`; NaN ranks first, as in torch's sort."""
    return (a != a and b == b) or a > b


@kernel
def _route(
    begin: int, end: int, room: int,
    logits: int, experts: int, topk: int, bias: int, expert_ids: int, wide: bool,
    scaling: float, renormalize: bool, shared: bool, weights: int, chosen: int,
) -> None:  # fmt: skip
    scores, choice = room, room + 4 * experts
    width = topk + (1 if shared else 0)
    for t in range(begin, end):
        for e in range(experts):
            x = get(logits, t * experts + e)
            score = math.sqrt(x if x > _LINEAR else np.float32(math.log1p(math.exp(x))))
            put(scores, e, score)
            put(choice, e, score + get(bias, e) if bias else score)
        out, picked = weights + 4 * t * width, chosen + 8 * t * width
        whole = ZERO
        for k in range(topk):
            best = -1
            if expert_ids:
                best = integer(expert_ids, wide, t * topk + k)
            else:
                for e in range(experts):
                    free = True
                    for j in range(k):
                        free = free and get_i64(picked, j) != e
                    if free and (best < 0 or _better(get(choice, e), get(choice, best))):
                        best = e
            put_i64(picked, k, best)
            put(out, k, get(scores, best))
            whole += get(scores, best)
        for k in range(topk):
            weight = get(out, k) / whole if renormalize else get(out, k) * ONE
            put(out, k, weight * scaling)
        if shared:
            put(out, topk, ONE)
            put_i64(picked, topk, experts)
