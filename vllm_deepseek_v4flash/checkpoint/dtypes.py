"""safetensors' dtype codes as torch's dtypes."""

from __future__ import annotations

from ..ops.torch_or_dtypes import torch
from .headers import TensorHeader

# The sub-byte and complex codes never hold a weight that a format here reads.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def header_of(tensor: torch.Tensor, name: str = "") -> TensorHeader:
    """The header that safetensors would write for a tensor; torch's name of the dtype where there is no code."""
    return TensorHeader(_CODES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), name)
