"""Against the compressed-tensors library itself: it packs random weights, and unpacks them for comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from testing.fixtures import headers
from testing.format_cases import FP8_GROUP, MODULE, ct_config, weights_args
from vllm_deepseek_v4flash.checkpoint.formats import FORMATS
from vllm_deepseek_v4flash.ops.packed_weight import dequantise

N, K = 200, 384


def leaves_of(form: str, weights: dict[str, Any], state: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """The library's stored tensors, and its dequantisation of them."""
    compressor = BaseCompressor.get_value_from_registry(form)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    leaves = compressor.compress(dict(state), scheme)
    return leaves, compressor.decompress(dict(leaves), scheme)["weight"]


def agrees(weights: dict[str, Any], leaves: dict[str, torch.Tensor], library: torch.Tensor) -> None:
    form, config = FORMATS["compressed-tensors"], ct_config(weights)
    scheme = form.describe(config, MODULE, headers(leaves))
    assert library.dtype == torch.float32
    assert torch.equal(form.dequantise(leaves, scheme), library)
    assert torch.equal(dequantise(form.repack(leaves, scheme), scheme), library)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group", "actorder"),
    # The library refuses actorder group where a row is one group.
    [
        (group, order)
        for group in (32, 64, 128, -1)
        for order in (None, "static", "group")
        if (group, order) != (-1, "group")
    ],
)
def test_pack_quantized(group: int, symmetric: bool, actorder: str | None) -> None:
    generator = torch.Generator().manual_seed(group)
    size = K if group == -1 else group
    strategy = {"strategy": "channel", "group_size": None} if group == -1 else {"group_size": group}
    weights = weights_args(symmetric=symmetric, actorder=actorder, **strategy)
    # fp32 scales, so that the library computes in fp32; bf16 scales are the same numbers.
    scale = (torch.rand(N, K // size, generator=generator) * 0.1 + 0.01).bfloat16().float()
    state = {"weight": torch.randn(N, K, generator=generator), "weight_scale": scale}
    zeros = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8)
    state["weight_zero_point"] = torch.zeros_like(zeros) if symmetric else zeros
    if actorder == "group":
        state["weight_g_idx"] = (torch.arange(K) // size)[torch.randperm(K, generator=generator)].int()
    leaves, library = leaves_of("pack-quantized", weights, state)
    assert leaves["weight_packed"].dtype == torch.int32
    agrees(weights, leaves, library)


def test_g_idx_left_at_minus_one() -> None:
    weights = weights_args(actorder="group")
    state = {
        "weight": torch.randn(N, K, generator=torch.Generator().manual_seed(0)),
        "weight_scale": torch.full((N, K // 64), 0.1),
        "weight_g_idx": torch.full((K,), -1, dtype=torch.int32),
    }
    agrees(weights, *leaves_of("pack-quantized", weights, state))


def test_float_quantized_block() -> None:
    generator = torch.Generator().manual_seed(0)
    n, k = 256, 384
    state = {
        "weight": torch.randn(n, k, generator=generator),
        "weight_scale": torch.rand(n // 128, k // 128, generator=generator) * 0.01 + 1e-3,
    }
    agrees(FP8_GROUP, *leaves_of("float-quantized", FP8_GROUP, state))
