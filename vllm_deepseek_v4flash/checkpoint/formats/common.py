"""Checks and bit manipulation that several formats share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ...config import printable, shown
from ...ops.packed_weight import QuantizationError, Scheme
from ...ops.torch_or_dtypes import torch
from ..headers import TensorHeader

# Parameters of the router that share its prefix but are not part of its weight.
_ROUTER_PARAMETERS = ("bias", "tid2eid")


@dataclass(frozen=True)
class Leaf:
    """What a stored tensor must look like."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    required: bool = True


def is_router_parameter(module: str, leaf: str) -> bool:
    """Whether a tensor is a parameter of its own although it is named like a leaf of the router's weight."""
    return leaf in _ROUTER_PARAMETERS and module.endswith("ffn.gate")


def weight_leaves(module: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that make up the module's weight."""
    return {leaf: value for leaf, value in leaves.items() if not is_router_parameter(module, leaf)}


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def check_leaves(module: str, leaves: Mapping[str, TensorHeader], expected: Mapping[str, Leaf], why: str) -> None:
    """Every expected leaf is there with its shape and dtype, and no other.

    `why` says what the expectation follows from ("group_size 128, scales [32, 2048]").
    """
    for name, leaf in expected.items():
        stored = leaves.get(name)
        if stored is None:
            if leaf.required:
                raise QuantizationError(f"{module}: tensor {name} is missing; should be {_shape(leaf.shape)} ({why})")
            continue
        if stored.dtype not in leaf.dtypes:
            raise QuantizationError(
                f"{module}: tensor {name} has dtype {stored.dtype}, should be {either(leaf.dtypes)}"
            )
        if tuple(stored.shape) != leaf.shape:
            raise QuantizationError(
                f"{module}: tensor {name} has shape {_shape(tuple(stored.shape))}, "
                f"should be {_shape(leaf.shape)} ({why})"
            )
    unexpected = sorted(set(leaves) - set(expected))
    if unexpected:
        raise QuantizationError(
            f"{module}: unexpected tensor {', '.join(unexpected)}; this layout has {', '.join(expected)}"
        )


def check_matrix(module: str, name: str, header: TensorHeader | None) -> tuple[int, int]:
    """The two sizes of a tensor that others are measured by."""
    if header is None:
        raise QuantizationError(f"{module}: tensor {name} is missing")
    if len(header.shape) != 2 or 0 in header.shape:
        raise QuantizationError(f"{module}: tensor {name} has shape {_shape(tuple(header.shape))}, should be a matrix")
    return header.shape[0], header.shape[1]


def either(values: tuple[str, ...]) -> str:
    return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " or " + values[-1]


def refuse_value(module: str, key: str, value: object, allowed: str) -> NoReturn:
    """Refuse one value of the config that no reader here understands."""
    raise QuantizationError(
        f"{module}: {key}={shown(value)} in quantization_config: not supported. It should be {allowed}."
    )


def check_bits(module: str, bits: object, kind: object = "int") -> None:
    if isinstance(bits, str) and bits.strip() == "4":
        refuse_value(module, "bits", bits, "the number 4, without quotation marks")
    if isinstance(bits, bool) or bits != 4 or kind != "int":
        raise QuantizationError(
            f"{module}: the config says {_shown_bits(bits)}-bit {_shown_bits(kind)} weights, which are not supported. "
            "Packed weights may be 4-bit integers, DeepSeek's FP4 (e2m1, a ue8m0 scale per 32) or FP8 (e4m3, a scale "
            "per 128 x 128)."
        )


def _shown_bits(value: object) -> str:
    return printable(value) if isinstance(value, str) else shown(value)


def resolve_group(module: str, group_size: object, k: int) -> int:
    """Columns that share a scale; -1 (and any size of K or more) is one group for the whole row."""
    if not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size <= 0 and group_size != -1):
        refuse_value(module, "group_size", group_size, "a positive integer, or -1 for one group per row")
    group = k if group_size == -1 or group_size > k else group_size
    if k % group:
        raise QuantizationError(
            f"{module}: {k} input columns are not a whole number of groups of {group}. "
            "Set the group_size that the weights were quantised with."
        )
    return group


def refuse_excluded(module: str, leaf: str, pattern: str, where: str) -> NoReturn:
    raise QuantizationError(
        f"{module}: tensor {leaf} is packed, but {where} leaves this module unquantised ({pattern!r}). "
        "Remove that entry, or use the config that the weights were written with."
    )


def check_scales(module: str, name: str, scales: torch.Tensor) -> None:
    """No NaN, no infinity (for ue8m0: no code 255, its NaN)."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        bad = scales.view(torch.uint8) == 255
    else:
        bad = ~torch.isfinite(scales)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise QuantizationError(
            f"{module}: tensor {name} has {int(bad.sum())} scales that are NaN or inf, the first at {_shape(first)}; "
            "scales should be finite"
        )


def check_symmetric_zeros(module: str, name: str, zeros: torch.Tensor, zero: int = 8) -> None:
    """`zeros` as the layout decodes them: all `zero`, as a symmetric config promises."""
    bad = zeros != zero
    if bad.any():
        raise QuantizationError(
            f"{module}: tensor {name} has a zero point of {int(zeros[bad][0])}, should be {zero} everywhere because "
            "the config says symmetric. If the weights are asymmetric, say so in the config."
        )


def check_bias(module: str, bias: torch.Tensor | None) -> None:
    """AutoGPTQ stores a bias of zeros where a layer has none; the model cannot use any other."""
    if bias is not None and bool((bias != 0).any()):
        raise QuantizationError(f"{module}: tensor bias is not zero, but DeepSeek-V4 has no biases here")


def permutation(module: str, name: str, g_idx: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Columns sorted by group, int64 [K]; within a group they keep their order.

    Raises:
        QuantizationError: an index out of range, or groups of unequal size.
    """
    k, group = scheme.shape[1], scheme.group_size
    check_g_idx(module, name, g_idx, k // group)
    groups = g_idx.long()
    counts = torch.bincount(groups, minlength=k // group)
    if (counts != group).any():
        worst = int((counts != group).nonzero()[0])
        raise QuantizationError(
            f"{module}: tensor {name} gives group {worst} {int(counts[worst])} columns, should be {group} "
            "in every group"
        )
    return torch.argsort(groups, stable=True)


def check_g_idx(module: str, name: str, g_idx: torch.Tensor, groups: int) -> None:
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise QuantizationError(
            f"{module}: tensor {name} holds group {low if low < 0 else high}, should be 0 to {groups - 1}"
        )


def check_trivial_g_idx(module: str, name: str, g_idx: torch.Tensor | None, scheme: Scheme, remedy: str) -> None:
    """Without act-order, column k belongs to group k // group_size."""
    if g_idx is None:
        return
    k, group = scheme.shape[1], scheme.group_size
    check_g_idx(module, name, g_idx, k // group)
    moved = g_idx.long() != torch.arange(k, device=g_idx.device) // group
    if moved.any():
        column = int(moved.nonzero()[0])
        raise QuantizationError(
            f"{module}: tensor {name} puts column {column} in group {int(g_idx[column])}, should be {column // group} "
            f"because the config has no act-order; {remedy}"
        )


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] to uint8 [R, 8C], lowest nibble first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(-2)


def interleave_rows(codes: torch.Tensor) -> torch.Tensor:
    """Canonical `qweight` [N, K/2] of uint8 codes [K, N], K first."""
    return (codes[0::2] | (codes[1::2] << 4)).t().contiguous()
