"""Random weights in every format, written from known codes, scales and zero points.

`CASES` has an entry for every registered format (`test_formats.py` checks that). A case's `weight` is computed from the
codes, so it is an oracle for everything that reads the stored tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

MODULE = "layers.3.ffn.experts.7.w1"
# The leaves that hold codes, and those that hold scales, in all formats.
WEIGHT_LEAVES = ("weight", "qweight", "weight_packed")
SCALE_LEAVES = ("scales", "weight_scale", "scale", "weight_scale_inv")
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    leaves: dict[str, torch.Tensor]
    weight: torch.Tensor
    kind: str = "int4"
    module: str = MODULE


def pack(codes: torch.Tensor, dim: int, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """int32 words of eight codes along `dim` (padded with zeros); nibble i holds column order[i] of its eight."""
    array = codes.numpy().astype(np.uint32)
    array = np.moveaxis(array, dim, -1)
    array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % 8)])
    words = np.zeros((*array.shape[:-1], array.shape[-1] // 8), np.uint32)
    for nibble, column in enumerate(order):
        words |= array[..., column::8] << np.uint32(4 * nibble)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, dim)).view(np.int32))


@dataclass(frozen=True)
class Int4:
    """Codes [N, K], zero points and scales [N, G], and the group of each column."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        difference = self.codes.int() - self.zeros.int()[:, self.g_idx]
        return difference.float() * self.scales.float()[:, self.g_idx]


def random_int4(n: int, k: int, group: int, asymmetric: bool, ordered: bool, dtype: torch.dtype, seed: int) -> Int4:
    generator = torch.Generator().manual_seed(seed)
    group = k if group == -1 else group
    codes = torch.randint(0, 16, (n, k), generator=generator)
    codes[0, :16] = torch.arange(16)
    zeros = torch.randint(0, 16, (n, k // group), generator=generator) if asymmetric else torch.full((n, k // group), 8)
    if asymmetric:
        zeros[:2] = torch.tensor([0, 15])[:, None]
    scales = (torch.rand(n, k // group, generator=generator) * 0.1 + 1e-3).to(dtype)
    g_idx = torch.arange(k) // group
    if ordered:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    return Int4(codes, zeros, scales, g_idx)


def gptq(
    n: int = 48, k: int = 256, group: int = 64, asymmetric: bool = False, ordered: bool = False, v2: bool = False,
    dtype: torch.dtype = torch.float16, seed: int = 0, **config: Any,
) -> Case:  # fmt: skip
    data = random_int4(n, k, group, asymmetric, ordered, dtype, seed)
    qzeros = pack(data.zeros.t(), 1)
    if not v2:
        # As the tools write v1: less one by whole words, so that a zero point of 0 borrows from the next.
        qzeros = (qzeros.long() - 0x11111111).to(torch.int32)
    leaves = {
        "qweight": pack(data.codes.t(), 0),
        "qzeros": qzeros,
        "scales": data.scales.t().contiguous(),
        "g_idx": data.g_idx.int(),
    }
    base = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": not asymmetric, "desc_act": ordered}
    return Case({**base, "checkpoint_format": "gptq_v2" if v2 else "gptq", **config}, leaves, data.weight)


def awq(
    n: int = 48, k: int = 256, group: int = 64, asymmetric: bool = True, dtype: torch.dtype = torch.float16,
    seed: int = 0, config: dict[str, Any] | None = None,
) -> Case:  # fmt: skip
    data = random_int4(n, k, group, asymmetric, False, dtype, seed)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    leaves = {
        "qweight": pack(data.codes.t(), 1, order),
        "qzeros": pack(data.zeros.t(), 1, order),
        "scales": data.scales.t().contiguous(),
    }
    base = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": asymmetric, "version": "gemm"}
    return Case(config or base, leaves, data.weight)


def auto_round(label: str | None, **arguments: Any) -> Case:
    extra = arguments.pop("extra", {})
    if label == "auto_round:auto_awq":
        case = awq(**arguments)
    else:
        v2 = label in ("auto_round:gptqmodel", "auto_round")
        if extra.get("model_free"):
            v2 = arguments.get("asymmetric", False) and not extra["autoround_version"].startswith("0.15.")
        case = gptq(v2=v2, **arguments)
    config = {"quant_method": "auto-round", "bits": 4, "group_size": arguments.get("group", 64), "data_type": "int"}
    config["sym"] = not arguments.get("asymmetric", label == "auto_round:auto_awq")
    if label is not None:
        config["packing_format"] = label
    return Case({**config, **extra}, case.leaves, case.weight)


def weights_args(**arguments: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, **arguments}


def ct_config(weights: dict[str, Any], targets: tuple[str, ...] = ("Linear",), **config: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **config}


def compressed(
    n: int = 48, k: int = 256, group: int = 64, asymmetric: bool = False, actorder: str | None = None,
    unpacked_zeros: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> Case:  # fmt: skip
    ordered = actorder in ("group", "dynamic")
    data = random_int4(n, k, group, asymmetric, ordered, dtype, seed)
    leaves = {
        "weight_packed": pack(data.codes, 1),
        "weight_scale": data.scales,
        "weight_shape": torch.tensor([n, k]),
    }
    if asymmetric:
        leaves["weight_zero_point"] = (data.zeros - 8).to(torch.int8) if unpacked_zeros else pack(data.zeros, 0)
    if ordered:
        leaves["weight_g_idx"] = data.g_idx.int()
    strategy = {"strategy": "channel", "group_size": None} if group == -1 else {"group_size": group}
    return Case(ct_config(weights_args(symmetric=not asymmetric, actorder=actorder, **strategy)), leaves, data.weight)


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
FP8_GROUP = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [128, 128]}


def fp4(scale: str = "scale", as_bytes: bool = False, seed: int = 0, **config: Any) -> Case:
    n, k = 40, 96
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    exponents = torch.randint(100, 140, (n, k // 32), generator=generator)
    exponents[0, 0], exponents[1, 0] = 0, 254
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    weight = torch.tensor(E2M1, dtype=torch.float64)[codes] * torch.exp2((exponents - 127).double()).repeat_interleave(
        32, 1
    )
    scales = exponents.to(torch.uint8)
    leaves = {
        "weight": packed if as_bytes else packed.view(torch.int8),
        scale: scales if as_bytes else scales.view(torch.float8_e8m0fnu),
    }
    return Case({**FP8_CONFIG, **config}, leaves, weight.float(), "fp4")


def fp8(
    scale: str = "scale", dtype: torch.dtype = torch.float8_e8m0fnu, n: int = 200, k: int = 320, seed: int = 0,
    config: dict[str, Any] | None = None,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (n, k), generator=generator).to(torch.uint8)
    octets[(octets & 127) == 127] = 0  # NaN
    weight = octets.view(torch.float8_e4m3fn)
    grid = (-(-n // 128), -(-k // 128))
    if dtype in (torch.float8_e8m0fnu, torch.uint8):
        exponents = torch.randint(110, 135, grid, generator=generator)
        values = torch.exp2((exponents - 127).float())
        scales = exponents.to(torch.uint8).view(dtype)
    else:
        scales = torch.rand(grid, generator=generator).to(dtype)
        values = scales.float()
    expected = torch.empty(n, k)
    for i in range(n):
        for j in range(grid[1]):
            expected[i, 128 * j : 128 * (j + 1)] = weight[i, 128 * j : 128 * (j + 1)].float() * values[i // 128, j]
    return Case(config or FP8_CONFIG, {"weight": weight, scale: scales}, expected, "fp8", "layers.3.attn.wq_b")


def plain(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Case:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Case(config, {"weight": weight}, weight.float(), "plain")


Make = Callable[[], Case]
_GEMM = {"quant_method": "gptq", "checkpoint_format": "gemm", "bits": 4, "group_size": 64, "sym": False}

CASES: dict[str, dict[str, Make]] = {
    "gptq": {
        **{
            f"{'v2' if v2 else 'v1'}-g{group}-{'asym' if asymmetric else 'sym'}{'-act' if ordered else ''}": partial(
                gptq, group=group, asymmetric=asymmetric, ordered=ordered, v2=v2, seed=group + 2
            )
            for v2 in (False, True)
            for group in (32, 64, 128, -1)
            for asymmetric in (False, True)
            for ordered in (False, True)
        },
        "few-outputs": partial(gptq, n=4, asymmetric=True),
        "outputs-not-a-multiple-of-8": partial(gptq, n=36, asymmetric=True, ordered=True),
        "bf16-scales": partial(gptq, dtype=torch.bfloat16),
        "fp32-scales": partial(gptq, dtype=torch.float32),
        "group-beyond-the-row": partial(gptq, k=64, group=64),
        "gemm": partial(awq, config=_GEMM),
        "plain": partial(plain, {"quant_method": "gptq"}, torch.float16),
        "fp8": partial(fp8, config={"quant_method": "gptq"}),
    },
    "awq": {
        **{
            f"g{group}-{'asym' if asymmetric else 'sym'}": partial(
                awq, group=group, asymmetric=asymmetric, seed=group + 2
            )
            for group in (32, 64, 128, -1)
            for asymmetric in (False, True)
        },
        "few-outputs": partial(awq, n=4),
        "outputs-not-a-multiple-of-8": partial(awq, n=36),
        "plain": partial(plain, {"quant_method": "awq"}, torch.float32),
    },
    "auto-round": {
        "no-label": partial(auto_round, None),
        "auto_gptq": partial(auto_round, "auto_round:auto_gptq", group=128),
        "auto_gptq-asym": partial(auto_round, "auto_round:auto_gptq", asymmetric=True),
        "gptqmodel-asym": partial(auto_round, "auto_round:gptqmodel", asymmetric=True),
        "as-labelled-asym": partial(auto_round, "auto_round", asymmetric=True),
        **{
            f"model-free-{version}-{label.rpartition(':')[2]}{'-asym' * asymmetric}": partial(
                auto_round, label, asymmetric=asymmetric, extra={"model_free": True, "autoround_version": version}
            )
            for version in ("0.15.1", "0.16.0", "0.16.1", "1.0.0.post1+cpu")
            for label in ("auto_round", "auto_round:auto_gptq")
            for asymmetric in (False, True)
        },
        "auto_awq": partial(auto_round, "auto_round:auto_awq"),
        "plain": partial(plain, {"quant_method": "auto-round"}),
    },
    "compressed-tensors": {
        **{
            f"g{group}-{'asym' if asymmetric else 'sym'}-{actorder}": partial(
                compressed, group=group, asymmetric=asymmetric, actorder=actorder, seed=group + 2
            )
            for group in (32, 64, 128, -1)
            for asymmetric in (False, True)
            for actorder in (None, "static", "group")
            if not (actorder == "group" and group == -1)
        },
        "zero-points-not-packed": partial(compressed, asymmetric=True, unpacked_zeros=True),
        "few-outputs": partial(compressed, n=4, asymmetric=True),
        "fp32-scales": partial(compressed, dtype=torch.float32),
        "fp8-block": partial(fp8, "weight_scale", torch.bfloat16, config=ct_config(FP8_GROUP)),
        "plain": partial(plain, ct_config(weights_args())),
    },
    "deepseek": {
        "fp4": fp4,
        "fp4-bytes": partial(fp4, as_bytes=True),
        "fp4-scale-inv": partial(fp4, "weight_scale_inv", quant_method="deepseek_v4_fp8"),
        "fp8-ue8m0": fp8,
        "fp8-ue8m0-bytes": partial(fp8, dtype=torch.uint8),
        "fp8-fp32": partial(fp8, "weight_scale_inv", torch.float32),
        "fp8-one-block": partial(fp8, n=64, k=64),
        "plain": partial(plain, FP8_CONFIG),
    },
    "unquantised": {
        name: partial(plain, {}, dtype)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    },
}
