from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from ..packed_weight import FP8_BLOCK, Scheme, dequantise

_WORKSPACE = 1 << 22  # fp32 values dequantised at once, in whole blocks of FP8_BLOCK rows


def packed_linear(x: torch.Tensor, weight: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    if x.ndim == 2:
        return torch.cat([F.linear(x, rows.to(x.dtype)) for rows in _row_blocks(weight, scheme)], dim=-1)
    by_group = torch.cat([rows.to(x.dtype) for rows in _row_blocks(weight, scheme)]).unflatten(0, (x.shape[1], -1))
    return torch.bmm(x.transpose(0, 1), by_group.transpose(1, 2)).transpose(0, 1)


def _row_blocks(weight: Mapping[str, torch.Tensor], scheme: Scheme) -> Iterator[torch.Tensor]:
    """The dequantised weight [N, K] fp32, a bounded number of rows at a time."""
    rows = weight["qweight"].shape[0]
    columns = weight["qweight"].shape[1] * (1 if scheme.kind == "fp8" else 2)
    step = max(FP8_BLOCK, _WORKSPACE // columns // FP8_BLOCK * FP8_BLOCK)
    for start in range(0, rows, step):
        yield dequantise({name: _rows(name, t, scheme, start, step) for name, t in weight.items()}, scheme)


def _rows(name: str, tensor: torch.Tensor, scheme: Scheme, start: int, count: int) -> torch.Tensor:
    if name == "perm":
        return tensor
    if name == "scales" and scheme.kind == "fp8":
        return tensor[start // FP8_BLOCK : -(-(start + count) // FP8_BLOCK)]
    return tensor[start : start + count]
