from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def merged_linear(
    x: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[torch.Tensor]:
    """One product for each run of parts of one dtype, so that no part is converted afterwards."""
    results: list[torch.Tensor] = []
    start = 0
    for dtype, parts in itertools.groupby(zip(sizes, dtypes, strict=True), key=lambda part: part[1]):
        run = [size for size, _ in parts]
        results += multiply(x, weight[start : start + sum(run)], dtype).split(run, dim=-1)
        start += sum(run)
    return results


def multiply(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x @ weight.T`, [T, K] and [N, K] to [T, N] of `dtype`, summed in fp32 and rounded once."""
    if x.dtype == weight.dtype == dtype:
        return F.linear(x, weight)
    if x.is_cuda and x.dtype == weight.dtype and dtype == torch.float32:
        # cuBLAS can keep the fp32 sums; the CPU's GEMM would round them.
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float()).to(dtype)
