from __future__ import annotations

import torch

from . import threads
from .compiling import kernel
from .memory import code, load, packed, size_of, store
from .products import dots

_TOKENS = 64  # of one group, per product


def grouped_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    num_tokens, groups, width = x.shape
    x, weight = packed(x, weight)
    rows = weight.shape[0] // groups
    out = x.new_empty((num_tokens, groups, rows))
    threads.run(
        _grouped, groups * -(-num_tokens // _TOKENS), float(num_tokens * weight.numel()), _TOKENS * (width + rows),
        x.data_ptr(), code(x), num_tokens, groups, width, weight.data_ptr(), code(weight), rows, out.data_ptr(),
    )  # fmt: skip
    return out


@kernel
def _grouped(
    begin: int, end: int, room: int,
    x: int, dtype: int, num_tokens: int, groups: int, width: int, weight: int, weight_dtype: int, rows: int, out: int,
) -> None:  # fmt: skip
    size, products = size_of(dtype), room + 4 * _TOKENS * width
    for item in range(begin, end):
        first, group = item // groups * _TOKENS, item % groups
        tokens = min(_TOKENS, num_tokens - first)
        for t in range(tokens):
            load(x + ((first + t) * groups + group) * width * size, dtype, width, room + 4 * t * width)
        part = weight + group * rows * width * size_of(weight_dtype)
        dots(room, tokens, part, weight_dtype, rows, width, products, rows)
        for t in range(tokens):
            store(out + ((first + t) * groups + group) * rows * size, dtype, rows, products + 4 * t * rows)
