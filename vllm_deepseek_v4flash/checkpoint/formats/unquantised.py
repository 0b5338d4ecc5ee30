"""A checkpoint without a `quantization_config`: floating point only, as its tensors say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...ops.packed_weight import Scheme
from ..headers import TensorHeader
from .floats import dequantise, repack
from .floats import describe as _describe

__all__ = ["claims", "dequantise", "describe", "repack"]


def claims(config: Mapping[str, Any]) -> bool:
    return not config


def describe(config: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    return _describe(module, leaves, "unquantised (its config.json has no quantization_config)")
