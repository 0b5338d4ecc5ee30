from __future__ import annotations

import numpy as np
import torch

from . import threads
from .arithmetic import ZERO
from .compiling import kernel
from .memory import code, fill, get, get_i32, integer, load, packed, put, put_i32, rounded, size_of
from .products import dots
from .swiglu import activate

_TOKENS = 64  # processed together


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
    x, w13, w2, topk_weights, topk_ids = packed(x, w13, w2, topk_weights, topk_ids)
    experts, inner, topk = w13.shape[0], w2.shape[2], topk_ids.shape[1]
    out = torch.empty((num_tokens, hidden))
    threads.run(
        _experts, -(-num_tokens // _TOKENS), float(num_tokens * topk * 3 * hidden * inner),
        _TOKENS * (topk * (1 + 2 * hidden + 3 * inner)),
        num_tokens, x.data_ptr(), code(x), hidden, w13.data_ptr(), w2.data_ptr(), code(w13), experts, inner,
        topk_weights.data_ptr(), topk_ids.data_ptr(), topk_ids.element_size() == 8, topk,
        np.inf if swiglu_limit is None else swiglu_limit, first_expert, out.data_ptr(),
    )  # fmt: skip
    return out


@kernel
def _experts(
    begin: int, end: int, room: int,
    num_tokens: int, x: int, dtype: int, hidden: int, w13: int, w2: int, weight_dtype: int, experts: int, inner: int,
    topk_weights: int, topk_ids: int, wide: bool, topk: int,
    limit: float, first_expert: int, out: int,
) -> None:  # fmt: skip
    most = _TOKENS * topk
    visits, rows = room, room + 4 * most
    halves = rows + 4 * most * hidden
    active = halves + 8 * most * inner
    down = active + 4 * most * inner
    size = hidden * inner * size_of(weight_dtype)
    for block in range(begin, end):
        first, last = block * _TOKENS, min(block * _TOKENS + _TOKENS, num_tokens)
        fill(out + 4 * first * hidden, (last - first) * hidden, ZERO)
        for expert in range(experts):
            count = 0
            for visit in range(first * topk, last * topk):
                if integer(topk_ids, wide, visit) - first_expert == expert:
                    put_i32(visits, count, visit)
                    load(x + visit // topk * hidden * size_of(dtype), dtype, hidden, rows + 4 * count * hidden)
                    count += 1
            if count == 0:
                continue
            dots(rows, count, w13 + 2 * expert * size, weight_dtype, 2 * inner, hidden, halves, 2 * inner)
            for i in range(count):
                half, weight = halves + 8 * i * inner, get(topk_weights, get_i32(visits, i))
                for j in range(inner):
                    gate, up = rounded(get(half, j), dtype), rounded(get(half, inner + j), dtype)
                    put(active, i * inner + j, rounded(activate(gate, up, limit) * weight, dtype))
            dots(active, count, w2 + expert * size, weight_dtype, hidden, inner, down, hidden)
            for i in range(count):
                total = out + get_i32(visits, i) // topk * 4 * hidden
                for j in range(hidden):
                    put(total, j, get(total, j) + rounded(get(down, i * hidden + j), dtype))
