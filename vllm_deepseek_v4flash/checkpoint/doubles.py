"""Tensors that a checkpoint stores twice, under two names.

AutoRound writes what it finds missing of a model into `model_extra_tensors.safetensors`, and misses a tensor that it
has saved under transformers' name. That is harmless where the values are the same.
"""

from __future__ import annotations

import math

from ..ops.torch_or_dtypes import torch
from . import names
from .dtypes import DTYPES
from .headers import DTYPE_BITS, TensorHeader

_PIECE = 1 << 22


def may_be_stored_twice(native: str) -> bool:
    """Whether a second copy is compared with the first: those outside the layers, where such copies occur."""
    return names.layer_index(native) is None


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same values, or one holds the other's, rounded to its dtype."""
    return torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))


def same_in_files(one: TensorHeader, other: TensorHeader) -> bool:
    """`same_values` of two tensors in files, piece by piece; true where their bytes are not on this machine."""
    size = math.prod(one.shape)
    if not (size and one.offsets[1] and other.offsets[1]):
        return True
    return all(
        same_values(_read(one, start, min(_PIECE, size - start)), _read(other, start, min(_PIECE, size - start)))
        for start in range(0, size, _PIECE)
    )


def _read(header: TensorHeader, start: int, count: int) -> torch.Tensor:
    """`count` values of a tensor from its value number `start`, flat."""
    width = DTYPE_BITS[header.dtype] // 8
    with header.file.open("rb") as stream:
        stream.seek(header.offsets[0] + start * width)
        return torch.frombuffer(bytearray(stream.read(count * width)), dtype=DTYPES[header.dtype])
