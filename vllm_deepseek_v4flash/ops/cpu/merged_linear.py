from __future__ import annotations

from collections.abc import Sequence

import torch

from . import threads
from .compiling import PARTS, Parts, kernel
from .memory import CODES, FP32, code, load, packed, size_of, store
from .products import dots

_TOKENS, _ROWS = 64, 64
"""Tokens and rows of the weight that are multiplied at a time: both stay in the first cache."""


def merged_linear(
    x: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[torch.Tensor]:
    if len(sizes) > PARTS:
        head = sum(sizes[:PARTS])
        first = merged_linear(x, weight[:head], sizes[:PARTS], dtypes[:PARTS])
        return first + merged_linear(x, weight[head:], sizes[PARTS:], dtypes[PARTS:])
    num_tokens, width = x.shape
    x, weight = packed(x, weight)
    results: list[torch.Tensor] = []
    parts: list[int] = []
    tiles = 0
    for size, dtype in zip(sizes, dtypes, strict=True):
        result = torch.empty((num_tokens, size), dtype=dtype)
        results.append(result)
        parts += size, result.data_ptr(), CODES[dtype]
        tiles += -(-size // _ROWS)
    parts += (0,) * (3 * PARTS - len(parts))
    threads.run(
        _merged, tiles * -(-num_tokens // _TOKENS), float(num_tokens * weight.numel()), _TOKENS * (width + _ROWS),
        x.data_ptr(), code(x), num_tokens, width, weight.data_ptr(), code(weight), tiles, tuple(parts),
    )  # fmt: skip
    return results


@kernel
def _merged(
    begin: int, end: int, room: int,
    x: int, dtype: int, num_tokens: int, width: int, weight: int, weight_dtype: int, tiles: int, parts: Parts,
) -> None:  # fmt: skip
    products = room + 4 * _TOKENS * width
    for item in range(begin, end):
        # `tile` of all parts' becomes one of part `part`'s, whose rows begin at row `above` of the weight.
        first, tile, part, above = item // tiles * _TOKENS, item % tiles, 0, 0
        while tile * _ROWS >= parts[part]:
            tile -= (parts[part] + _ROWS - 1) // _ROWS
            above += parts[part]
            part += 3
        rows, result, result_dtype = parts[part], parts[part + 1], parts[part + 2]
        tokens, start = min(_TOKENS, num_tokens - first), tile * _ROWS
        count = min(_ROWS, rows - start)
        source = x + first * width * size_of(dtype)
        if dtype != FP32:
            load(source, dtype, tokens * width, room)
            source = room
        matrix = weight + (above + start) * width * size_of(weight_dtype)
        result += (first * rows + start) * size_of(result_dtype)
        if result_dtype == FP32:
            dots(source, tokens, matrix, weight_dtype, count, width, result, rows)
        else:
            dots(source, tokens, matrix, weight_dtype, count, width, products, count)
            for t in range(tokens):
                store(result + t * rows * size_of(result_dtype), result_dtype, count, products + 4 * t * count)
