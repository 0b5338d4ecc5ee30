"""compressed-tensors: `pack-quantized` 4-bit integers, with or without FP8 blocks (llm-compressor writes both).

`weight_packed` int32 [N, K/8], lowest nibble first, holds value + 8; `weight_scale` [N, G]; `weight_zero_point` int32
[ceil(N/8), G], packed along N and also + 8 (older files: int8 [N, G], without the 8); `weight_shape` int64 [2];
`weight_g_idx` int32 [K] where `actorder` is "group". `actorder` "static" changes nothing in the format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...ops.packed_weight import FP8_BLOCK, QuantizationError, Scheme
from ...ops.torch_or_dtypes import torch
from ..dtypes import DTYPES, header_of
from ..headers import FLOAT_CODES, TensorHeader
from . import floats
from .common import (
    Leaf,
    check_bits,
    check_g_idx,
    check_leaves,
    check_matrix,
    check_scales,
    check_symmetric_zeros,
    check_trivial_g_idx,
    permutation,
    refuse_excluded,
    refuse_value,
    resolve_group,
    unpack_nibbles,
)
from .format import Format
from .gptq import permute_columns
from .patterns import Match, is_module, regex_match

SOURCE = "pack-quantized"
_CLASSES = {
    "embed": ("Embedding", "VocabParallelEmbedding"),
    "head": ("Linear", "LinearBase", "ParallelLMHead"),
}
_LINEAR = ("Linear", "LinearBase")
_REMEDY = 'set actorder to "group" in the config if the weights were quantised with it'


def _matches(target: str, module: str) -> tuple[int, Match]:
    """How specific a target or ignore entry is (0: a name, 1: a regular expression, 2: a class), and its match."""
    if target.startswith("re:"):
        return 1, regex_match(target.removeprefix("re:"), module, anchored=True)
    if target in _CLASSES.get(module, _LINEAR):
        return 2, "all"
    return 0, "all" if is_module(target, module) else "none"


def _groups(config: Mapping[str, Any], module: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and weight arguments of every group that targets the module, the most specific first."""
    found = []
    for name, group in (config.get("config_groups") or {}).items():
        ranks = [rank for rank, match in (_matches(t, module) for t in group.get("targets") or ()) if match != "none"]
        if ranks and group.get("weights"):
            found.append((min(ranks), name, group["weights"]))
    return [(name, weights) for _, name, weights in sorted(found, key=lambda entry: entry[0])]


def _refuse_ignored(ignore: Iterable[str], module: str, leaf: str) -> None:
    for pattern in ignore:
        if _matches(pattern, module)[1] == "all":
            refuse_excluded(module, leaf, pattern, "`ignore`")


def describe(config: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    leaf = next((name for name in ("weight_packed", "weight_scale") if name in leaves), None)
    if leaf is None:
        return floats.describe(module, leaves, "compressed-tensors")
    _refuse_ignored(config.get("ignore") or (), module, leaf)
    groups = _groups(config, module)
    if not groups:
        raise QuantizationError(
            f"{module}: tensor {leaf} is packed, but no entry of `config_groups` targets this module; "
            f"there are {sorted(config.get('config_groups') or {})}"
        )
    wanted = "int" if leaf == "weight_packed" else "float"
    name, weights = next((group for group in groups if group[1].get("type", "int") == wanted), groups[0])
    if leaf == "weight_packed":
        return _describe_packed(weights, module, leaves)
    return _describe_fp8(name, weights, module, leaves)


def _describe_fp8(name: str, weights: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    if isinstance(block, str):
        block = [int(size) for size in block.split("x")]
    if (bits, kind, strategy) != (8, "float", "block") or list(block or ()) != [FP8_BLOCK, FP8_BLOCK]:
        raise QuantizationError(
            f"{module}: group {name!r} of the config stores {bits}-bit {kind} weights with strategy {strategy!r} and "
            f"block_structure {block}, which is not supported; unpacked weights may be 8-bit float with strategy "
            f"'block' and block_structure [{FP8_BLOCK}, {FP8_BLOCK}]"
        )
    return floats.describe(module, leaves, "compressed-tensors")


def _describe_packed(weights: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    check_bits(module, weights.get("num_bits", 8), weights.get("type", "int"))
    n, words = check_matrix(module, "weight_packed", leaves["weight_packed"])
    k = 8 * words
    group_size, strategy = weights.get("group_size"), weights.get("strategy")
    strategy = strategy or ("group" if (group_size or 0) > 0 else "channel")
    if strategy not in ("group", "channel"):
        refuse_value(module, "strategy", strategy, "'group' or 'channel' for 4-bit weights")
    group = k if strategy == "channel" else resolve_group(module, group_size, k)
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    scale = leaves.get("weight_scale")
    scheme = Scheme(
        "int4",
        group_size=group,
        zero_points=not weights.get("symmetric", True),
        act_order=ordered and group < k,
        scale_dtype=DTYPES.get(scale.dtype) if scale is not None else None,
        source=SOURCE,
        module=module,
        shape=(n, k),
    )
    check_leaves(module, leaves, _expected(scheme, leaves), f"weight_packed [{n}, {words}], group_size {group}")
    return scheme


def _expected(scheme: Scheme, leaves: Mapping[str, TensorHeader]) -> dict[str, Leaf]:
    (n, k), groups = scheme.shape, scheme.shape[1] // scheme.group_size
    zeros = leaves.get("weight_zero_point")
    unpacked = zeros is not None and zeros.dtype == "I8"
    return {
        "weight_packed": Leaf((n, k // 8), ("I32",)),
        "weight_scale": Leaf((n, groups), FLOAT_CODES),
        "weight_zero_point": Leaf(
            (n, groups) if unpacked else (-(-n // 8), groups), ("I32", "I8"), required=scheme.zero_points
        ),
        "weight_g_idx": Leaf((k,), ("I32", "I64"), required=scheme.act_order),
        "weight_shape": Leaf((2,), ("I64", "I32"), required=False),
    }


def _check(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> None:
    headers = {name: header_of(tensor) for name, tensor in leaves.items()}
    check_leaves(scheme.module, headers, _expected(scheme, headers), f"group_size {scheme.group_size}")
    check_scales(scheme.module, "weight_scale", leaves["weight_scale"])
    shape = leaves.get("weight_shape")
    if shape is not None and tuple(shape.tolist()) != scheme.shape:
        raise QuantizationError(
            f"{scheme.module}: tensor weight_shape says {shape.tolist()}, should be {list(scheme.shape)} "
            "(from weight_packed)"
        )
    zeros = leaves.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int8:
        low, high = int(zeros.min()), int(zeros.max())
        if low < -8 or high > 7:
            raise QuantizationError(
                f"{scheme.module}: tensor weight_zero_point holds {low if low < -8 else high}, should be -8 to 7"
            )


def _zeros(zeros: torch.Tensor, n: int) -> torch.Tensor:
    """Zero points + 8, uint8 [N, G]."""
    if zeros.dtype == torch.int8:
        return (zeros + 8).to(torch.uint8)
    return unpack_nibbles(zeros.t().contiguous())[:, :n].t().contiguous()


def _g_idx(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor | None:
    """None where there is none, or it was left at its initial -1 (the library then takes groups in order)."""
    g_idx = leaves.get("weight_g_idx")
    return None if g_idx is None or bool((g_idx == -1).all()) else g_idx


def repack(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    if floats.handles(scheme):
        return floats.repack(leaves, scheme)
    _check(leaves, scheme)
    packed, (n, k) = leaves["weight_packed"], scheme.shape
    canonical = {"scales": leaves["weight_scale"].contiguous()}
    if "weight_zero_point" in leaves:
        zeros = _zeros(leaves["weight_zero_point"], n)
        if scheme.zero_points:
            canonical["zeros"] = zeros
        else:
            check_symmetric_zeros(scheme.module, "weight_zero_point", zeros)
    g_idx = _g_idx(leaves, scheme)
    if not scheme.act_order:
        check_trivial_g_idx(scheme.module, "weight_g_idx", g_idx, scheme, _REMEDY)
        return {"qweight": packed.contiguous().view(torch.uint8), **canonical}
    if g_idx is None:
        perm = torch.arange(k, device=packed.device)
        canonical["qweight"] = packed.contiguous().view(torch.uint8)
    else:
        perm = permutation(scheme.module, "weight_g_idx", g_idx, scheme)
        canonical["qweight"] = permute_columns(packed.t().contiguous(), perm)
    canonical["perm"] = perm.to(torch.int32)
    return canonical


def dequantise(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    if floats.handles(scheme):
        return floats.dequantise(leaves, scheme)
    _check(leaves, scheme)
    (n, k), packed = scheme.shape, leaves["weight_packed"].long()
    shifts = torch.arange(0, 32, 4, device=packed.device)
    values = ((packed[:, :, None] >> shifts) & 15).flatten(1) - 8
    groups = torch.arange(k, device=packed.device) // scheme.group_size
    g_idx = _g_idx(leaves, scheme)
    if scheme.act_order and g_idx is not None:
        check_g_idx(scheme.module, "weight_g_idx", g_idx, k // scheme.group_size)
        groups = g_idx.long()
    zeros = torch.zeros(n, k // scheme.group_size, dtype=torch.int64, device=packed.device)
    stored = leaves.get("weight_zero_point")
    if stored is not None and stored.dtype == torch.int8:
        zeros = stored.long()
    elif stored is not None:
        zeros = ((stored.long()[:, None] >> shifts[None, :, None]) & 15).flatten(0, 1)[:n] - 8
    return (values - zeros[:, groups]).float() * leaves["weight_scale"].float()[:, groups] + 0.0


FORMAT = Format("compressed-tensors", ("compressed-tensors",), describe, repack, dequantise)
