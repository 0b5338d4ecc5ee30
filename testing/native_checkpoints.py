"""A writer of DeepSeek's own checkpoints: FP8 dense weights and FP4 or FP8 experts, each with its `scale`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from testing.format_cases import E2M1, FP8_CONFIG
from testing.tiny import TinySpec, random_tensors

Experts = Literal["fp4", "fp8"]

_DENSE = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "indexer.wq_b", "ffn.shared_experts.")


def quantise_fp8(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [N, K] and a scale per 128 x 128, a power of two where `scale_dtype` is ue8m0."""
    n, k = weight.shape
    scales = torch.empty(-(-n // 128), -(-k // 128))
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            scale = weight[block].abs().max().clamp(min=1e-4) / 448
            if scale_dtype == torch.float8_e8m0fnu:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scales[i, j] = scale
            codes[block] = (weight[block] / scale).to(torch.float8_e4m3fn)
    return codes, scales.to(scale_dtype)


def quantise_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """I8 [N, K/2] of e2m1 pairs, the even column low, and ue8m0 [N, K/32]."""
    grouped = weight.unflatten(1, (-1, 32))
    scales = torch.exp2(torch.ceil(torch.log2(grouped.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 6)))
    codes = (grouped / scales).unsqueeze(-1).sub(torch.tensor(E2M1)).abs().argmin(-1).flatten(1).to(torch.uint8)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8), scales.squeeze(-1).to(torch.float8_e8m0fnu)


def quantise(
    tensors: Mapping[str, torch.Tensor], experts: Experts, scale_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Native tensors as DeepSeek stores them; what it does not quantise stays as it is."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if ".ffn.experts." in name and experts == "fp4":
            stored[name], stored[f"{module}.scale"] = quantise_fp4(tensor.float())
        elif name.endswith(".weight") and (".ffn.experts." in name or any(part in name for part in _DENSE)):
            stored[name], stored[f"{module}.scale"] = quantise_fp8(tensor.float(), scale_dtype)
        else:
            stored[name] = tensor
    return stored


def write_native(
    directory: Path, spec: TinySpec, experts: Experts = "fp4", scale_dtype: torch.dtype = torch.float8_e8m0fnu
) -> Path:
    """Write `spec` as DeepSeek does and return the directory.

    Args:
        experts: "fp4" as in Flash, "fp8" as in Flash-Base.
        scale_dtype: of the FP8 scales: float8_e8m0fnu, or float32 as in Flash-Base.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stored = quantise(random_tensors(spec), experts, scale_dtype)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    quantization = {**FP8_CONFIG, "activation_scheme": "dynamic"}
    if scale_dtype == torch.float32:
        del quantization["scale_fmt"]
    config = {**spec.hf_config, "quantization_config": quantization, "torch_dtype": "bfloat16", "expert_dtype": experts}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory
