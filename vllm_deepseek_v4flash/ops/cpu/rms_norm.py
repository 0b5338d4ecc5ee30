from __future__ import annotations

import torch

from . import threads
from .arithmetic import inverse_rms
from .compiling import helper, kernel
from .memory import code, get, load, packed, put, rounded, size_of, store


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    x, weight = packed(x, weight)
    out = torch.empty_like(x)
    dim = x.shape[-1]
    rows = x.numel() // dim if dim else 0
    threads.run(
        _norm, rows, 4.0 * x.numel(), 2 * dim,
        x.data_ptr(), out.data_ptr(), code(x), dim,
        0 if weight is None else weight.data_ptr(), 0 if weight is None else code(weight), eps,
    )  # fmt: skip
    return out


@helper
def normalise(x, dim, weight, eps, dtype):
    """The row `x` in place, times the fp32 row at `weight` unless that is 0; rounded to `dtype`."""
    factor = inverse_rms(x, dim, eps)
    for i in range(dim):
        value = get(x, i) * factor
        put(x, i, rounded(get(weight, i) * value if weight else value, dtype))


@kernel
def _norm(
    begin: int, end: int, room: int,
    x: int, out: int, dtype: int, dim: int, weight: int, weight_dtype: int, eps: float,
) -> None:  # fmt: skip
    row, factors = room, 0
    if weight:
        factors = room + 4 * dim
        load(weight, weight_dtype, dim, factors)
    for t in range(begin, end):
        load(x + t * dim * size_of(dtype), dtype, dim, row)
        normalise(row, dim, factors, eps, dtype)
        store(out + t * dim * size_of(dtype), dtype, dim, row)
