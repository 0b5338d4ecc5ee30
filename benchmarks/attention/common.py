"""What the cases of this benchmark share: bounds, aims and labels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_deepseek_v4flash.kv_cache.page_sizes import PageSize

from ..roofline import Aim

BF16 = torch.bfloat16
BF16_ROUNDING = 2.0**-8
"""The largest relative change by rounding to bf16; 2^-7 is the distance between neighbours."""
FP32_SUM = 2.0**-23
"""The relative error of each addition in a tensor core, which truncates."""
HC_EPS = 1e-6


def share_of_bandwidth(batch: int) -> list[Aim]:
    if batch < 32:
        return []
    return [Aim("at least 70 % of the copy bandwidth", lambda row: known(row.bandwidth_percent, lambda p: p >= 70))]


def known(value: float | None, test: Callable[[float], bool]) -> bool | None:
    """`test` of a value that may not have been measured."""
    return None if value is None else test(value)


def short(tokens: int) -> str:
    """A number of tokens in units of k or M, if it is a multiple."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def row_bytes(page: PageSize) -> int:
    """Bytes of a cached row."""
    return page.format.row_size * page.format.dtype.itemsize
