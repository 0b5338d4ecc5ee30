from __future__ import annotations

from collections.abc import Sequence

import torch

from . import threads
from .compiling import MATRICES, Matrices, kernel
from .memory import CODES, FP32, code, load, packed, size_of, store
from .products import dots

_TOKENS, _ROWS = 64, 64
"""Tokens and rows of a weight that are multiplied at a time: both stay in the first cache."""


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    if len(weights) > MATRICES:
        return linears(x, weights[:MATRICES], dtypes[:MATRICES]) + linears(x, weights[MATRICES:], dtypes[MATRICES:])
    num_tokens, width = x.shape
    x, *weights = packed(x, *weights)
    matrices: list[int] = []
    results, parts, rows = [], 0, 0
    for weight, dtype in zip(weights, dtypes, strict=True):
        count = weight.shape[0]
        result = torch.empty((num_tokens, count), dtype=dtype)
        results.append(result)
        matrices += weight.data_ptr(), count, code(weight), result.data_ptr(), CODES[dtype]
        parts += -(-count // _ROWS)
        rows += count
    matrices += (0,) * (5 * (MATRICES - len(weights)))
    threads.run(
        _linears, parts * -(-num_tokens // _TOKENS), float(num_tokens * rows * width), _TOKENS * (width + _ROWS),
        x.data_ptr(), code(x), num_tokens, width, parts, tuple(matrices),
    )  # fmt: skip
    return results


@kernel
def _linears(
    begin: int, end: int, room: int,
    x: int, dtype: int, num_tokens: int, width: int, parts: int, matrices: Matrices,
) -> None:  # fmt: skip
    products = room + 4 * _TOKENS * width
    for item in range(begin, end):
        first, part, matrix = item // parts * _TOKENS, item % parts, 0
        while part * _ROWS >= matrices[matrix + 1]:
            part -= (matrices[matrix + 1] + _ROWS - 1) // _ROWS
            matrix += 5
        weight, rows, weight_dtype = matrices[matrix], matrices[matrix + 1], matrices[matrix + 2]
        result, result_dtype = matrices[matrix + 3], matrices[matrix + 4]
        tokens, start = min(_TOKENS, num_tokens - first), part * _ROWS
        count = min(_ROWS, rows - start)
        source = x + first * width * size_of(dtype)
        if dtype != FP32:
            load(source, dtype, tokens * width, room)
            source = room
        weight += start * width * size_of(weight_dtype)
        result += (first * rows + start) * size_of(result_dtype)
        if result_dtype == FP32:
            dots(source, tokens, weight, weight_dtype, count, width, result, rows)
        else:
            dots(source, tokens, weight, weight_dtype, count, width, products, count)
            for t in range(tokens):
                store(result + t * rows * size_of(result_dtype), result_dtype, count, products + 4 * t * count)
