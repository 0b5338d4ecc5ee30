from __future__ import annotations

import torch

from ..reference.linear_fp32 import linear_fp32 as linear_fp32_by_blas
from . import threads
from .arithmetic import products
from .compiling import kernel
from .memory import code, load, packed, size_of

_FEW = 16  # tokens up to which the weight's conversion to fp32 costs more than the product


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_tokens, width = x.shape
    if num_tokens > (4 if weight.dtype == torch.float32 else _FEW):
        return linear_fp32_by_blas(x, weight)
    x, weight = packed(x, weight)
    rows = weight.shape[0]
    out = torch.empty((num_tokens, rows))
    threads.run(
        _linear, num_tokens, 0.0, width,
        x.data_ptr(), code(x), weight.data_ptr(), code(weight), rows, width, out.data_ptr(),
    )  # fmt: skip
    return out


@kernel
def _linear(
    begin: int, end: int, room: int,
    x: int, dtype: int, weight: int, weight_dtype: int, rows: int, width: int, out: int,
) -> None:  # fmt: skip
    for t in range(begin, end):
        load(x + t * width * size_of(dtype), dtype, width, room)
        products(room, weight, weight_dtype, rows, width, out + 4 * t * rows)
