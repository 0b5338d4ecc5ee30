"""GPTQ as AutoGPTQ and GPTQModel store it: packed along the input dimension.

`qweight` int32 [K/8, N], eight rows a word, lowest nibble first; `qzeros` int32 [G, ceil(N/8)], eight columns a
word; `scales` [G, N]; `g_idx` int32 [K], the group of each input row; the rows keep their order.

Format v1 stores every zero point minus one, `gptq_v2` the zero point itself. The tools that write v1 subtract
0x11111111 from whole words, so that a zero point of 0 borrows from its neighbour. Adding it back to whole words, as
GPTQModel does, undoes that; adding it nibble by nibble would not.

GPTQModel packs an embedding along its tokens: `qweight` [tokens/8, channels], `scales` [G, channels].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...ops.packed_weight import Scheme
from ...ops.torch_or_dtypes import torch
from ..dtypes import DTYPES, header_of
from ..headers import FLOAT_CODES, TensorHeader
from . import awq, floats
from .common import (
    Leaf,
    check_bias,
    check_bits,
    check_leaves,
    check_matrix,
    check_scales,
    check_symmetric_zeros,
    check_trivial_g_idx,
    either,
    interleave_rows,
    permutation,
    refuse_excluded,
    refuse_value,
    resolve_group,
    unpack_nibbles,
)
from .format import Format
from .patterns import regex_match

V1, V2 = "gptq_v1", "gptq_v2"
_LAYOUTS = {"gptq": V1, "gptq_v2": V2, "gemm": awq.SOURCE}
_EIGHT_ONES = 0x11111111
_REMEDY = "set desc_act to true in the config if the weights were quantised with it"


@dataclass(frozen=True)
class Settings:
    """What a config says about one module's integer weights."""

    bits: object
    group_size: object
    symmetric: bool
    act_order: bool = False


def _settings(config: Mapping[str, Any], module: str) -> Settings:
    settings = Settings(
        config.get("bits", 4), config.get("group_size", 128), bool(config.get("sym", True)),
        bool(config.get("desc_act", False)),
    )  # fmt: skip
    for pattern, override in (config.get("dynamic") or {}).items():
        # GPTQModel's `dynamic`: "-:" excludes a module, "+:" or no prefix overrides; the first match counts.
        found = regex_match(pattern.removeprefix("+:").removeprefix("-:"), module, anchored=True)
        if pattern.startswith("-:"):
            if found == "all":
                refuse_excluded(module, "qweight", pattern, "`dynamic`")
        elif found != "none":
            return replace(
                settings,
                bits=override.get("bits", settings.bits),
                group_size=override.get("group_size", settings.group_size),
                symmetric=bool(override.get("sym", settings.symmetric)),
                act_order=bool(override.get("desc_act", settings.act_order)),
            )
    return settings


def describe(config: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    if "qweight" not in leaves:
        return floats.describe(module, leaves, "gptq")
    name = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if name not in _LAYOUTS:
        refuse_value(module, "checkpoint_format", name, either(tuple(_LAYOUTS)))
    if config.get("pack_dtype", "int32") != "int32":
        refuse_value(module, "pack_dtype", config["pack_dtype"], "'int32'")
    return describe_packed(_LAYOUTS[name], _settings(config, module), module, leaves)


def describe_packed(source: str, settings: Settings, module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    """The scheme of `qweight` and its companions in the layout `source` (V1, V2 or AWQ's)."""
    check_bits(module, settings.bits)
    if source == awq.SOURCE:
        return awq.describe_packed(settings.group_size, settings.symmetric, module, leaves)
    rows, n = check_matrix(module, "qweight", leaves.get("qweight"))
    k = 8 * rows
    group = resolve_group(module, settings.group_size, k)
    scales = leaves.get("scales")
    scheme = Scheme(
        "int4",
        group_size=group,
        zero_points=not settings.symmetric,
        # With one group there is nothing to reorder.
        act_order=settings.act_order and group < k,
        scale_dtype=DTYPES.get(scales.dtype) if scales is not None else None,
        source=source,
        module=module,
        shape=(n, k),
    )
    check_leaves(module, leaves, _expected(scheme), f"qweight [{rows}, {n}], group_size {group}")
    return scheme


def _expected(scheme: Scheme) -> dict[str, Leaf]:
    (n, k), groups = scheme.shape, scheme.shape[1] // scheme.group_size
    return {
        "qweight": Leaf((k // 8, n), ("I32",)),
        "scales": Leaf((groups, n), FLOAT_CODES),
        "qzeros": Leaf((groups, -(-n // 8)), ("I32",), required=scheme.zero_points),
        "g_idx": Leaf((k,), ("I32", "I64"), required=scheme.act_order),
        "bias": Leaf((n,), FLOAT_CODES, required=False),
    }


def _check(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> None:
    headers = {name: header_of(tensor) for name, tensor in leaves.items()}
    check_leaves(scheme.module, headers, _expected(scheme), f"group_size {scheme.group_size}")
    check_scales(scheme.module, "scales", leaves["scales"])
    check_bias(scheme.module, leaves.get("bias"))
    if not scheme.act_order:
        check_trivial_g_idx(scheme.module, "g_idx", leaves.get("g_idx"), scheme, _REMEDY)


def _zeros(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor | None:
    """True zero points, uint8 [N, G]; None where a symmetric checkpoint has none."""
    packed = leaves.get("qzeros")
    if packed is None:
        return None
    words = packed + _EIGHT_ONES if scheme.source == V1 else packed
    return unpack_nibbles(words)[:, : scheme.shape[0]].t().contiguous()


def repack(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    if floats.handles(scheme):
        return floats.repack(leaves, scheme)
    if scheme.source == awq.SOURCE:
        return awq.repack(leaves, scheme)
    _check(leaves, scheme)
    canonical = {"scales": leaves["scales"].t().contiguous()}
    zeros = _zeros(leaves, scheme)
    if scheme.zero_points:
        assert zeros is not None
        canonical["zeros"] = zeros
    elif zeros is not None:
        check_symmetric_zeros(scheme.module, "qzeros", zeros)
    if not scheme.act_order:
        # A word of eight input columns, lowest nibble first, is four canonical bytes as it stands.
        return {"qweight": leaves["qweight"].t().contiguous().view(torch.uint8), **canonical}
    perm = permutation(scheme.module, "g_idx", leaves["g_idx"], scheme)
    canonical["qweight"] = permute_columns(leaves["qweight"], perm)
    canonical["perm"] = perm.to(torch.int32)
    return canonical


def permute_columns(qweight: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Canonical `qweight` [N, K/2] of int32 [K/8, N], its input columns in the order `perm`."""
    words, n = qweight.shape
    codes = torch.empty(words, 8, n, dtype=torch.uint8, device=qweight.device)
    for byte in range(4):
        # Converting to uint8 keeps the lowest byte; it runs several times faster than a strided view of the bytes.
        octets = (qweight >> 8 * byte).to(torch.uint8)
        torch.bitwise_and(octets, 15, out=codes[:, 2 * byte])
        torch.bitwise_right_shift(octets, 4, out=codes[:, 2 * byte + 1])
    return interleave_rows(codes.flatten(0, 1).index_select(0, perm))


def dequantise(leaves: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    if floats.handles(scheme):
        return floats.dequantise(leaves, scheme)
    if scheme.source == awq.SOURCE:
        return awq.dequantise(leaves, scheme)
    _check(leaves, scheme)
    n, k = scheme.shape
    shifts = torch.arange(0, 32, 4, device=leaves["qweight"].device)
    codes = ((leaves["qweight"].long()[:, None] >> shifts[None, :, None]) & 15).reshape(k, n)
    zeros = torch.full((k // scheme.group_size, n), 8, device=codes.device)
    if "qzeros" in leaves:
        words = leaves["qzeros"].long() + (_EIGHT_ONES if scheme.source == V1 else 0)
        zeros = ((words[:, :, None] >> shifts) & 15).flatten(1)[:, :n]
    groups = torch.arange(k, device=codes.device) // scheme.group_size
    if scheme.act_order:
        permutation(scheme.module, "g_idx", leaves["g_idx"], scheme)
        groups = leaves["g_idx"].long()
    return ((codes - zeros[groups]).float() * leaves["scales"].float()[groups] + 0.0).t().contiguous()


FORMAT = Format("gptq", ("gptq",), describe, repack, dequantise, transposes_embedding=True)
