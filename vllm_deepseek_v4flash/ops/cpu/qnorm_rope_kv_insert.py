from __future__ import annotations

import torch

from ..rows import PagedRows
from . import threads
from .arithmetic import ONE, rotate
from .compiling import Cache, helper, kernel
from .memory import code, get, get_i64, load, packed, put, rounded, size_of, store
from .paged import cache, page_at, write_row
from .rms_norm import normalise


def qnorm_rope_kv_insert(
    q: torch.Tensor, kv: torch.Tensor, cos_sin: torch.Tensor, window: PagedRows, slots: torch.Tensor, *, eps: float
) -> torch.Tensor:
    num_tokens, heads, dim = q.shape
    q, kv, cos_sin, slots = packed(q, kv, cos_sin, slots)
    out = torch.empty_like(q)
    threads.run(
        _insert, num_tokens, 8.0 * q.numel(), dim,
        q.data_ptr(), kv.data_ptr(), out.data_ptr(), code(q), heads, dim, cos_sin.data_ptr(), cos_sin.shape[1],
        cache(window), slots.data_ptr(), eps,
    )  # fmt: skip
    return out


@helper
def rotate_rounded(row, dim, table, rotary, dtype):
    """Rotate the last `rotary` values of the fp32 row, and round them to `dtype`."""
    tail = row + 4 * (dim - rotary)
    rotate(tail, table, rotary // 2, ONE)
    for i in range(rotary):
        put(tail, i, rounded(get(tail, i), dtype))


@kernel
def _insert(
    begin: int, end: int, room: int,
    q: int, kv: int, out: int, dtype: int, heads: int, dim: int, cos_sin: int, rotary: int,
    window: Cache, slots: int, eps: float,
) -> None:  # fmt: skip
    size = size_of(dtype)
    for t in range(begin, end):
        table = cos_sin + 4 * t * rotary
        slot = get_i64(slots, t)
        if slot >= 0:
            load(kv + t * dim * size, dtype, dim, room)
            rotate_rounded(room, dim, table, rotary, dtype)
            page, row = page_at(window, slot)
            write_row(window, page, row, room)
        for h in range(heads):
            at = (t * heads + h) * dim * size
            load(q + at, dtype, dim, room)
            normalise(room, dim, 0, eps, dtype)
            rotate_rounded(room, dim, table, rotary, dtype)
            store(out + at, dtype, dim, room)
