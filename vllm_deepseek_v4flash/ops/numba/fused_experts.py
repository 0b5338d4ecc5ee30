from __future__ import annotations

import numpy as np
import torch

from ..reference.fused_experts import fused_experts as fused_experts_by_blas
from . import threads
from .arithmetic import ZERO, products
from .compiling import kernel
from .memory import code, fill, get, integer, load, packed, put, rounded, size_of
from .swiglu import activate

_FEW = 32  # tokens up to which an expert has too few of them for a matrix product


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
    num_tokens, hidden = x.shape
    if num_tokens > _FEW:
        return fused_experts_by_blas(
            x, w13, w2, topk_weights, topk_ids, swiglu_limit=swiglu_limit, first_expert=first_expert
        )
    x, w13, w2, topk_weights, topk_ids = packed(x, w13, w2, topk_weights, topk_ids)
    experts, inner, topk = w13.shape[0], w2.shape[2], topk_ids.shape[1]
    out = torch.empty((num_tokens, hidden))
    threads.run(
        _experts, num_tokens, float(num_tokens * topk * 3 * hidden * inner), 2 * hidden + 2 * inner,
        x.data_ptr(), code(x), hidden, w13.data_ptr(), w2.data_ptr(), code(w13), experts, inner,
        topk_weights.data_ptr(), topk_ids.data_ptr(), topk_ids.element_size() == 8, topk,
        np.inf if swiglu_limit is None else swiglu_limit, first_expert, out.data_ptr(),
    )  # fmt: skip
    return out


@kernel
def _experts(
    begin: int, end: int, room: int,
    x: int, dtype: int, hidden: int, w13: int, w2: int, weight_dtype: int, experts: int, inner: int,
    topk_weights: int, topk_ids: int, wide: bool, topk: int,
    limit: float, first_expert: int, out: int,
) -> None:  # fmt: skip
    row, down = room, room + 4 * hidden
    halves = down + 4 * hidden
    size = hidden * inner * size_of(weight_dtype)
    for t in range(begin, end):
        load(x + t * hidden * size_of(dtype), dtype, hidden, row)
        total = out + 4 * t * hidden
        fill(total, hidden, ZERO)
        for k in range(topk):
            expert = integer(topk_ids, wide, t * topk + k) - first_expert
            if 0 <= expert < experts:
                products(row, w13 + 2 * expert * size, weight_dtype, 2 * inner, hidden, halves)
                weight = get(topk_weights, t * topk + k)
                for i in range(inner):
                    gate, up = rounded(get(halves, i), dtype), rounded(get(halves, inner + i), dtype)
                    put(halves, i, rounded(activate(gate, up, limit) * weight, dtype))
                products(halves, w2 + expert * size, weight_dtype, hidden, inner, down)
                for i in range(hidden):
                    put(total, i, get(total, i) + rounded(get(down, i), dtype))
