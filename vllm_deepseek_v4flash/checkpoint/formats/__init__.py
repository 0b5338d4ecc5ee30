"""The checkpoint formats, each read into the canonical form of `ops/packed_weight.py`.

A format is one file whose `FORMAT` is registered below. The loader, `inspect` and vLLM's quantization config ask this
registry, and every test of `tests/checkpoint/formats` runs on all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import shown
from ...ops.packed_weight import QuantizationError
from . import auto_round, awq, compressed_tensors, deepseek, gptq, unquantised
from .common import either
from .format import Format as Format
from .structure import check_structure

FORMATS: dict[str, Format] = {}


def register(added: Format) -> None:
    """Read checkpoints of this format from now on.

    Raises:
        ValueError: its name or one of its methods is taken.
    """
    if added.name in FORMATS or any(map(is_supported, added.quant_methods)):
        raise ValueError(f"format {added.name!r} for {', '.join(added.quant_methods)}: already registered")
    FORMATS[added.name] = added


def quant_methods() -> tuple[str, ...]:
    """Every `quant_method` that some format reads."""
    return tuple(method for known in FORMATS.values() for method in known.quant_methods)


def is_supported(quant_method: str) -> bool:
    """Whether some format reads this `quant_method`, in any spelling."""
    return _spelled(quant_method) in map(_spelled, quant_methods())


def same_method(one: str, other: str) -> bool:
    """Whether two values of `quant_method` select the same format, in any spelling."""
    return any(
        {_spelled(one), _spelled(other)} <= set(map(_spelled, known.quant_methods)) for known in FORMATS.values()
    )


def format_of(quantization_config: Mapping[str, Any] | None) -> Format:
    """The format of a checkpoint with this `quantization_config`; None or empty means unquantised.

    Raises:
        QuantizationError: no format reads its `quant_method`, or a list or object in it is none.
    """
    if not quantization_config:
        return unquantised.FORMAT
    method = quantization_config.get("quant_method")
    for known in FORMATS.values():
        if _spelled(method) in map(_spelled, known.quant_methods):
            check_structure(quantization_config)
            return known
    raise QuantizationError(
        f"quant_method={shown(method)} in quantization_config: not supported. Use a checkpoint whose quant_method is "
        f"{either(quant_methods())}, or an unquantised one in bfloat16, float16 or float32."
    )


def _spelled(method: object) -> str:
    """A method as it is compared. vLLM, too, ignores case and reads compressed_tensors as compressed-tensors."""
    return str(method).lower().replace("_", "-")


for _module in (awq, gptq, auto_round, compressed_tensors, deepseek, unquantised):
    register(_module.FORMAT)
