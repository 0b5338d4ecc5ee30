"""The checkpoint formats, each read into the canonical form of `scheme.py`.

A format is a module with `claims`, `describe`, `repack` and `dequantise`. Listing it here serves it, and puts it
under every test of `tests/checkpoint/formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ...ops.packed_weight import QuantizationError, Scheme
from ..headers import TensorHeader
from . import auto_round, awq, compressed_tensors, deepseek, gptq, unquantised
from .common import either

__all__ = ["FORMATS", "Format", "format_of"]


@dataclass(frozen=True)
class Format:
    """One source format.

    Attributes:
        claims: Whether a `quantization_config` is of this format.
        describe: `(config, module, leaves)` to the scheme of a module, from the config and the tensors' headers.
            `module` is DeepSeek's name of it, `leaves` is keyed by leaf name (`qweight`, `weight_scale`, …).
        repack: `(leaves, scheme)` to the canonical tensors.
        dequantise: `(leaves, scheme)` to fp32 [N, K], straight from the stored tensors: the reference.

    The last three raise QuantizationError, which names module and tensor, what it has and what it should have.
    """

    name: str
    claims: Callable[[Mapping[str, Any]], bool]
    describe: Callable[[Mapping[str, Any], str, Mapping[str, TensorHeader]], Scheme]
    repack: Callable[[Mapping[str, torch.Tensor], Scheme], dict[str, torch.Tensor]]
    dequantise: Callable[[Mapping[str, torch.Tensor], Scheme], torch.Tensor]


def _format(name: str, module: ModuleType) -> Format:
    return Format(name, module.claims, module.describe, module.repack, module.dequantise)


FORMATS: dict[str, Format] = {
    name: _format(name, module)
    for name, module in (
        ("gptq", gptq),
        ("awq", awq),
        ("auto-round", auto_round),
        ("compressed-tensors", compressed_tensors),
        ("deepseek", deepseek),
        ("unquantised", unquantised),
    )
}


def format_of(quantization_config: Mapping[str, Any] | None) -> Format:
    """The format that a config.json's `quantization_config` (None or empty: none) speaks of.

    Raises:
        QuantizationError: no format claims its `quant_method`.
    """
    config = quantization_config or {}
    for candidate in FORMATS.values():
        if candidate.claims(config):
            return candidate
    raise QuantizationError(
        f"quant_method is {config.get('quant_method')!r} in quantization_config, should be "
        + either(("gptq", "awq", "auto-round", "compressed-tensors", "fp8", "deepseek_v4_fp8"))
    )
