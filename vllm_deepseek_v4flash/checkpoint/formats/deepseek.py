"""DeepSeek's own checkpoints: FP8 dense weights and FP4 (or, in Base, FP8) experts, each with its `scale`.

The tensors tell the two apart: e2m1 pairs in I8 with a ue8m0 scale per 32 columns, or e4m3 with a ue8m0 or fp32
scale per 128 x 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...ops.packed_weight import FP8_BLOCK, Scheme
from ..headers import TensorHeader
from . import floats
from .common import refuse_excluded, refuse_value
from .format import Format
from .patterns import find_name


def describe(config: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    scheme = floats.describe(module, leaves, "fp8")
    if scheme.kind == "plain":
        return scheme
    block = config.get("weight_block_size")
    if list(block or ()) != [FP8_BLOCK, FP8_BLOCK]:
        refuse_value(module, "weight_block_size", block, f"[{FP8_BLOCK}, {FP8_BLOCK}]")
    if config.get("fmt", "e4m3") != "e4m3":
        refuse_value(module, "fmt", config["fmt"], "'e4m3'")
    excluded = find_name(config.get("modules_to_not_convert") or (), module)
    if excluded is not None:
        refuse_excluded(module, "weight", excluded, "`modules_to_not_convert`")
    return scheme


FORMAT = Format("deepseek", ("fp8", "deepseek_v4_fp8"), describe, floats.repack, floats.dequantise)
