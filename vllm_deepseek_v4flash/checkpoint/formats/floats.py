"""Weights in floating point: plain, FP8 in blocks of 128 x 128, and DeepSeek's FP4.

Their tensors identify them, so any quantised checkpoint may mix them with its integer weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...ops.packed_weight import E2M1_VALUES, FP4_GROUP, FP8_BLOCK, QuantizationError, Scheme
from ...ops.torch_or_dtypes import torch
from ..dtypes import DTYPES, header_of
from ..headers import FLOAT_CODES, PLAIN_CODES, TensorHeader
from .common import Leaf, check_bias, check_leaves, check_matrix, check_scales, either, weight_leaves

# DeepSeek's own name, transformers' (multiplicative despite it), and compressed-tensors'.
SCALE_NAMES = ("scale", "weight_scale_inv", "weight_scale")
# The exponent of a ue8m0 scale is stored as F8_E8M0, or as its byte.
_UE8M0 = ("F8_E8M0", "U8")
_KINDS = ("plain", "fp8", "fp4")


def handles(scheme: Scheme) -> bool:
    return scheme.kind in _KINDS


def _scale_name(leaves: Mapping[str, object]) -> str:
    return next((name for name in SCALE_NAMES if name in leaves), SCALE_NAMES[0])


def describe(module: str, leaves: Mapping[str, TensorHeader], form: str) -> Scheme:
    """The scheme of a module that `form`, the checkpoint's format, did not pack.

    Raises:
        QuantizationError: the leaves match no layout of this file, or not each other.
    """
    leaves = weight_leaves(module, leaves)
    weight = leaves.get("weight")
    if weight is None:
        raise QuantizationError(
            f"{module}: has {', '.join(sorted(leaves)) or 'no tensors'}, should be a plain `weight` or the tensors of "
            f"the {form} format"
        )
    if weight.dtype in PLAIN_CODES:
        expected = {"weight": Leaf(tuple(weight.shape), PLAIN_CODES), "bias": _bias(weight)}
        check_leaves(module, leaves, expected, "an unquantised weight")
        return Scheme("plain", dtype=DTYPES[weight.dtype], source="plain", module=module, shape=tuple(weight.shape))
    n, columns = check_matrix(module, "weight", weight)
    if weight.dtype == "F8_E4M3":
        scheme = Scheme(
            "fp8", FP8_BLOCK, scale_dtype=torch.float32, source="block_fp8", module=module, shape=(n, columns)
        )
    elif weight.dtype in ("I8", "U8"):
        scheme = Scheme(
            "fp4", FP4_GROUP, scale_dtype=torch.uint8, source="native_fp4", module=module, shape=(n, 2 * columns)
        )
        if columns * 2 % FP4_GROUP:
            raise QuantizationError(
                f"{module}: tensor weight has {columns} bytes a row, should be a multiple of {FP4_GROUP // 2} "
                f"(FP4, a scale per {FP4_GROUP} values)"
            )
    else:
        raise QuantizationError(
            f"{module}: tensor weight has dtype {weight.dtype}, should be {either(PLAIN_CODES)} (plain), "
            "F8_E4M3 (FP8) or I8 (FP4)"
        )
    check_leaves(module, leaves, _expected(scheme, leaves), _why(scheme))
    return scheme


def _bias(weight: TensorHeader) -> Leaf:
    return Leaf(tuple(weight.shape[:1]), PLAIN_CODES, required=False)


def _why(scheme: Scheme) -> str:
    return "FP8, a scale per 128 x 128" if scheme.kind == "fp8" else "FP4, a scale per 32 columns"


def _expected(scheme: Scheme, leaves: Mapping[str, object]) -> dict[str, Leaf]:
    n, k = scheme.shape
    if scheme.kind == "fp8":
        grid = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
        return {"weight": Leaf((n, k), ("F8_E4M3",)), _scale_name(leaves): Leaf(grid, FLOAT_CODES + _UE8M0)}
    return {
        "weight": Leaf((n, k // 2), ("I8", "U8")),
        _scale_name(leaves): Leaf((n, k // FP4_GROUP), _UE8M0),
    }


def _checked(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    tensors = weight_leaves(scheme.module, leaves)
    headers = {name: header_of(tensor) for name, tensor in tensors.items()}
    if scheme.kind == "plain":
        expected = {"weight": Leaf(scheme.shape, PLAIN_CODES), "bias": Leaf(scheme.shape[:1], PLAIN_CODES, False)}
        check_leaves(scheme.module, headers, expected, "an unquantised weight")
        check_bias(scheme.module, tensors.get("bias"))
        return tensors
    check_leaves(scheme.module, headers, _expected(scheme, tensors), _why(scheme))
    name = _scale_name(tensors)
    check_scales(scheme.module, name, tensors[name])
    return tensors


def repack(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    tensors = _checked(leaves, scheme)
    weight = tensors["weight"]
    if scheme.kind == "plain":
        return {"weight": weight}
    scales = tensors[_scale_name(tensors)]
    if scheme.kind == "fp4":
        return {
            "qweight": weight.contiguous().view(torch.uint8),
            "scales": scales.contiguous().view(torch.uint8),
        }
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return {"qweight": weight.contiguous(), "scales": scales.float().contiguous()}


def dequantise(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    tensors = _checked(leaves, scheme)
    weight = tensors["weight"]
    if scheme.kind == "plain":
        return weight.to(torch.float32).contiguous()
    n, k = scheme.shape
    scales = tensors[_scale_name(tensors)]
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scales = torch.exp2(scales.view(torch.uint8).double() - 127)
    scales = scales.to(torch.float32)
    if scheme.kind == "fp8":
        grid = scales.repeat_interleave(FP8_BLOCK, 0)[:n].repeat_interleave(FP8_BLOCK, 1)[:, :k]
        return weight.to(torch.float32) * grid
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=weight.device)
    octets = weight.view(torch.uint8).int()
    out = torch.empty(n, k, dtype=torch.float32, device=weight.device)
    out[:, 0::2] = values[octets % 16]
    out[:, 1::2] = values[octets // 16]
    return out * scales.repeat_interleave(FP4_GROUP, 1)
