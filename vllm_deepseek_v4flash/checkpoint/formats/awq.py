"""AWQ's GEMM layout, which AutoAWQ, AutoRound and GPTQModel (`checkpoint_format: gemm`) write.

`qweight` int32 [K, ceil(N/8)], eight output columns a word in the nibble order 0, 2, 4, 6, 1, 3, 5, 7 (so that
column j is in nibble 0, 4, 1, 5, 2, 6, 3, 7); `qzeros` int32 [G, ceil(N/8)] packed the same way, zero points as is;
`scales` [G, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...ops.packed_weight import QuantizationError, Scheme
from ...ops.torch_or_dtypes import torch
from ..dtypes import DTYPES, header_of
from ..headers import FLOAT_CODES, TensorHeader
from . import floats
from .common import (
    Leaf,
    check_bias,
    check_bits,
    check_leaves,
    check_matrix,
    check_scales,
    check_symmetric_zeros,
    refuse_excluded,
    refuse_value,
    resolve_group,
    unpack_nibbles,
)
from .format import Format
from .patterns import find_name

SOURCE = "awq_gemm"
# The nibble that holds column j of eight, and the columns that the low and the high nibbles of the four bytes hold.
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
_LOW_COLUMNS, _HIGH_COLUMNS = (0, 4, 1, 5), (2, 6, 3, 7)


def describe(config: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    if "qweight" not in leaves:
        return floats.describe(module, leaves, "awq")
    # AutoAWQ calls its layout `version`, GPTQModel `checkpoint_format` (or, before, `format`).
    for key in ("version", "checkpoint_format", "format"):
        if str(config.get(key) or "gemm").lower() != "gemm":
            refuse_value(module, key, config[key], "'gemm'")
    excluded = find_name(config.get("modules_to_not_convert") or (), module)
    if excluded is not None:
        refuse_excluded(module, "qweight", excluded, "`modules_to_not_convert`")
    check_bits(module, config.get("bits", config.get("w_bit", 4)))
    zero_point = config.get("zero_point", not config.get("sym", False))
    group_size = config.get("group_size", config.get("q_group_size", 128))
    return describe_packed(group_size, not zero_point, module, leaves)


def describe_packed(group_size: object, symmetric: bool, module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    k, words = check_matrix(module, "qweight", leaves.get("qweight"))
    _, n = check_matrix(module, "scales", leaves.get("scales"))
    group = resolve_group(module, group_size, k)
    scheme = Scheme(
        "int4",
        group_size=group,
        zero_points=not symmetric,
        scale_dtype=DTYPES.get(leaves["scales"].dtype),
        source=SOURCE,
        module=module,
        shape=(n, k),
    )
    check_leaves(
        module, leaves, _expected(scheme), f"qweight [{k}, {words}], scales for {n} outputs, group_size {group}"
    )
    if k % 2:
        raise QuantizationError(f"{module}: tensor qweight has {k} input rows, should be an even number")
    return scheme


def _expected(scheme: Scheme) -> dict[str, Leaf]:
    (n, k), groups = scheme.shape, scheme.shape[1] // scheme.group_size
    return {
        "qweight": Leaf((k, -(-n // 8)), ("I32",)),
        "scales": Leaf((groups, n), FLOAT_CODES),
        "qzeros": Leaf((groups, -(-n // 8)), ("I32",), required=scheme.zero_points),
        "bias": Leaf((n,), FLOAT_CODES, required=False),
    }


def _check(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> None:
    headers = {name: header_of(tensor) for name, tensor in leaves.items()}
    check_leaves(scheme.module, headers, _expected(scheme), f"group_size {scheme.group_size}")
    check_scales(scheme.module, "scales", leaves["scales"])
    check_bias(scheme.module, leaves.get("bias"))


def repack(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    if floats.handles(scheme):
        return floats.repack(leaves, scheme)
    _check(leaves, scheme)
    n = scheme.shape[0]
    canonical = {"qweight": _transpose(leaves["qweight"])[:n], "scales": leaves["scales"].t().contiguous()}
    if "qzeros" in leaves:
        nibbles = unpack_nibbles(leaves["qzeros"]).unflatten(1, (-1, 8))
        zeros = nibbles[:, :, _NIBBLE_OF_COLUMN].flatten(1)[:, :n].t().contiguous()
        if scheme.zero_points:
            canonical["zeros"] = zeros
        else:
            check_symmetric_zeros(scheme.module, "qzeros", zeros)
    return canonical


def _transpose(qweight: torch.Tensor) -> torch.Tensor:
    """uint8 [8C, K/2] of int32 [K, C]: two input columns a byte, outputs in their order."""
    octets = qweight.contiguous().view(torch.uint8)
    even, odd = octets[0::2], octets[1::2]
    k, words = qweight.shape
    out = torch.empty(words, 8, k // 2, dtype=torch.uint8, device=qweight.device)
    low = (even & 15) | (odd << 4)
    _place(out, low, _LOW_COLUMNS)
    high = (even >> 4) | (odd & 0xF0)
    _place(out, high, _HIGH_COLUMNS)
    return out.flatten(0, 1)


def _place(out: torch.Tensor, octets: torch.Tensor, columns: tuple[int, ...]) -> None:
    rows = octets.t().contiguous().unflatten(0, (-1, 4))
    for byte, column in enumerate(columns):
        out[:, column] = rows[:, byte]


def _columns(packed: torch.Tensor, n: int) -> torch.Tensor:
    """int64 [R, n] of int32 [R, C]."""
    words = packed.long()
    return torch.stack([(words >> 4 * nibble) & 15 for nibble in _NIBBLE_OF_COLUMN], dim=2).flatten(1)[:, :n]


def dequantise(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    if floats.handles(scheme):
        return floats.dequantise(leaves, scheme)
    _check(leaves, scheme)
    n, group = scheme.shape[0], scheme.group_size
    codes = _columns(leaves["qweight"], n)
    scales = leaves["scales"].float().repeat_interleave(group, 0)
    zeros: torch.Tensor | int = 8
    if "qzeros" in leaves:
        zeros = _columns(leaves["qzeros"], n).repeat_interleave(group, 0)
    return ((codes - zeros).float() * scales + 0.0).t().contiguous()


FORMAT = Format("awq", ("awq",), describe, repack, dequantise)
