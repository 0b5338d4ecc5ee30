"""A weight that is not finite, or will not be, stops the load with its name: every kind of tensor, every format."""

from __future__ import annotations

import math

import pytest
import torch

from testing.fake_model import FakeModel
from testing.tiny import CONFIGS, fuse_experts, random_tensors
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError
from vllm_deepseek_v4flash.checkpoint.loader import load_weights
from vllm_deepseek_v4flash.checkpoint.names import stored_name
from vllm_deepseek_v4flash.checkpoint.values import check_packed_values, check_values
from vllm_deepseek_v4flash.ops.packed_weight import Scheme

CONFIG = CONFIGS["mixed"].config
NAMES = (
    "embed.weight", "head.weight", "norm.weight", "hc_head_fn", "layers.0.attn_norm.weight", "layers.1.hc_attn_scale",
    "layers.2.attn.wkv.weight", "layers.2.attn.attn_sink", "layers.2.attn.compressor.ape",
    "layers.2.attn.indexer.weights_proj.weight", "layers.3.ffn.gate.weight", "layers.3.ffn.gate.bias",
    "layers.4.ffn.experts.7.w2.weight", "layers.4.ffn.shared_experts.w1.weight",
)  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(CONFIGS["mixed"])


def refused(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> str:
    model = FakeModel(CONFIG).to(dtype)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, CONFIG, tensors.items(), dtype=dtype)
    return str(caught.value)


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """The last value becomes `value`."""
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


@pytest.mark.parametrize("name", NAMES)
def test_the_tensor_and_the_place(name: str, tensors: dict[str, torch.Tensor]) -> None:
    stored = {stored_name(native, "transformers"): tensor for native, tensor in tensors.items()}
    ours = stored_name(name, "transformers")
    at = [size - 1 for size in tensors[name].shape]
    for value in (math.nan, math.inf, -math.inf):
        message = refused(stored | {ours: with_value(tensors[name], value)})
        label = ours if ours == name else f"{ours} ({name})"
        assert message.startswith(f"{label}{at}={value}: every weight must be a finite number. Download"), message


def test_a_fused_expert(tensors: dict[str, torch.Tensor]) -> None:
    fused = fuse_experts(CONFIG, tensors)
    name = "layers.4.ffn.experts.down_proj"
    message = refused(fused | {name: with_value(fused[name], math.nan)})
    assert message.startswith(f"{name} (layers.4.ffn.experts.7.w2.weight)[127, 63]=nan: every weight"), message


@pytest.mark.parametrize(
    ("dtype", "value", "fix"),
    [
        (torch.float16, 1e5, "infinite in float16, .* Start with --dtype bfloat16 or float32."),
        (torch.bfloat16, 3.4e38, "infinite in bfloat16, .* Start with --dtype float32."),
    ],
)
def test_a_value_that_the_models_dtype_cannot_hold(
    dtype: torch.dtype, value: float, fix: str, tensors: dict[str, torch.Tensor]
) -> None:
    name = "layers.0.attn_norm.weight"
    message = refused(tensors | {name: with_value(tensors[name], -value)}, dtype)
    assert message.startswith(f"{name}[127]=-{value:g}: ")
    with pytest.raises(CheckpointError, match=fix):
        check_values(name, with_value(tensors[name], value), dtype)
    check_values(name, with_value(tensors[name], value), torch.float32)
    # Halfway to the number after the largest: rounds to it, which is infinity. Anything below rounds down.
    info = torch.finfo(dtype)
    edge = torch.tensor(info.max + info.max * info.eps / (2 * (2 - info.eps)))
    check_values(name, torch.nextafter(edge, torch.tensor(0.0))[None], dtype)
    with pytest.raises(CheckpointError):
        check_values(name, edge[None], dtype)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_codes(code: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    codes[codes % 128 == 0x7F] = 0
    check_values("w", codes.view(torch.float8_e4m3fn), torch.float32)
    codes[1, 3] = code
    with pytest.raises(CheckpointError, match=r"^w\[1, 3\]=nan: every weight"):
        check_values("w", codes.view(torch.float8_e4m3fn), torch.float32)


def test_integers_empty_tensors_and_tensors_without_memory_pass() -> None:
    check_values("w", torch.full((3,), -(2**31), dtype=torch.int32), torch.float16)
    check_values("w", torch.empty(0, 3), torch.float16)
    check_values("w", torch.empty(2, 3, device="meta"), torch.float16)


# The scheme, a code whose product with a scale is small, the one whose product is largest, and a scale (of fp4, its
# byte) with which that product is just finite in float16, where 65520 rounds to infinity.
SCHEMES = {
    "int4": (Scheme("int4", 32, scale_dtype=torch.float32), 0x88, 0x00, 8188.0),
    "int4 with zeros": (Scheme("int4", 32, zero_points=True, scale_dtype=torch.float32), 0x00, 0xFF, 4366.0),
    "fp4": (Scheme("fp4", 32), 0x00, 0x77, 127 + 13),
    "fp8": (Scheme("fp8", 128, scale_dtype=torch.float32), 0x00, 0x7E, 146.0),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_weights_whose_product_overflows(name: str) -> None:
    scheme, small, largest, scale = SCHEMES[name]
    fp8 = scheme.kind == "fp8"
    codes = torch.full((128, 128 if fp8 else 64), small, dtype=torch.uint8)
    scales = torch.full((1, 1) if fp8 else (128, 4), scale).to(torch.uint8 if scheme.kind == "fp4" else torch.float32)
    canonical = {"qweight": codes.view(torch.float8_e4m3fn) if fp8 else codes, "scales": scales}
    if scheme.zero_points:
        canonical["zeros"] = torch.zeros(128, 4, dtype=torch.uint8)
    codes[5, 7] = largest
    check_packed_values("w", canonical, scheme, torch.float16)
    scales += scales if scheme.kind != "fp4" else 1
    check_packed_values("w", canonical, scheme, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"^w\[5, \d+\]=-?\d.*: is infinite in float16"):
        check_packed_values("w", canonical, scheme, torch.float16)
    codes[5, 7] = small
    check_packed_values("w", canonical, scheme, torch.float16)
