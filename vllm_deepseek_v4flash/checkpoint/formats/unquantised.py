"""A checkpoint without a `quantization_config`: every weight is plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...ops.packed_weight import QuantizationError, Scheme
from ..headers import PLAIN_CODES, TensorHeader
from . import floats
from .common import either, weight_leaves
from .format import Format


def describe(config: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    weight = leaves.get("weight")
    if weight is None or weight.dtype not in PLAIN_CODES:
        held = [f"{leaf} {list(tensor.shape)} {tensor.dtype}" for leaf, tensor in weight_leaves(module, leaves).items()]
        raise QuantizationError(
            f"{module}: has {', '.join(held)}, should be a weight in {either(PLAIN_CODES)}, because config.json has no "
            "quantization_config. Restore the one that the checkpoint was written with, or use a bfloat16, float16 or "
            "float32 copy."
        )
    return floats.describe(module, leaves, "unquantised")


FORMAT = Format("unquantised", (), describe, floats.repack, floats.dequantise)
