"""A packed format that no tool writes: what a new file in `checkpoint/formats` has to hold, and nothing else.

`codes` uint8 [N, K/2], two columns a byte with the even one in the high nibble; `steps` fp32 [G, N] and `zeros` uint8
[G, N], one for every `group` columns of the config. value = (code - zero) * step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_deepseek_v4flash.checkpoint.dtypes import header_of
from vllm_deepseek_v4flash.checkpoint.formats import floats
from vllm_deepseek_v4flash.checkpoint.formats.common import (
    Leaf,
    check_leaves,
    check_matrix,
    check_scales,
    resolve_group,
)
from vllm_deepseek_v4flash.checkpoint.formats.format import Format
from vllm_deepseek_v4flash.checkpoint.headers import TensorHeader
from vllm_deepseek_v4flash.ops.packed_weight import Scheme


def describe(config: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    if "codes" not in leaves:
        return floats.describe(module, leaves, "toy4")
    n, half = check_matrix(module, "codes", leaves["codes"])
    group = resolve_group(module, config.get("group"), 2 * half)
    scheme = Scheme("int4", group, zero_points=True, scale_dtype=torch.float32, module=module, shape=(n, 2 * half))
    _check(module, leaves, scheme)
    return scheme


def _check(module: str, leaves: Mapping[str, TensorHeader], scheme: Scheme) -> None:
    (n, k), groups = scheme.shape, scheme.shape[1] // scheme.group_size
    expected = {
        "codes": Leaf((n, k // 2), ("U8",)),
        "steps": Leaf((groups, n), ("F32",)),
        "zeros": Leaf((groups, n), ("U8",)),
    }
    check_leaves(module, leaves, expected, f"group {scheme.group_size}")


def repack(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    if floats.handles(scheme):
        return floats.repack(leaves, scheme)
    _check(scheme.module, {name: header_of(tensor) for name, tensor in leaves.items()}, scheme)
    check_scales(scheme.module, "steps", leaves["steps"])
    codes = leaves["codes"]
    return {
        "qweight": (codes >> 4) | (codes << 4),
        "scales": leaves["steps"].t().contiguous(),
        "zeros": leaves["zeros"].t().contiguous(),
    }


def dequantise(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    if floats.handles(scheme):
        return floats.dequantise(leaves, scheme)
    codes = torch.stack((leaves["codes"] >> 4, leaves["codes"] & 15), dim=-1).flatten(1).float()
    zeros, steps = (leaves[name].float().t().repeat_interleave(scheme.group_size, 1) for name in ("zeros", "steps"))
    return (codes - zeros) * steps


FORMAT = Format("toy4", ("toy4",), describe, repack, dequantise)
