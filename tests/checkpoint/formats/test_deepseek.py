"""DeepSeek's own checkpoints, against transformers' dequantisation of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config
from transformers.quantizers import quantizer_finegrained_fp8

from testing.fixtures import headers
from testing.format_cases import FP8_CONFIG
from testing.native_checkpoints import Experts, write_native
from testing.tiny import CONFIGS
from vllm_deepseek_v4flash.checkpoint import names
from vllm_deepseek_v4flash.checkpoint.formats import format_of
from vllm_deepseek_v4flash.ops.packed_weight import dequantise

SPEC = CONFIGS["yarn"]


def dequantised_by_transformers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Parameters by native name, fp32."""
    # It asks for accelerate, which computing in FP8 on a GPU may need and dequantising does not.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    model = DeepseekV4ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        native = names.native_name(name)
        if native is None:
            continue
        if native.endswith((names.FUSED_GATE_UP, names.FUSED_DOWN)):
            for part, index in names.fused_parts(SPEC.config, native):
                found[part] = tensor[index]
        else:
            found[native] = tensor
    return found


@pytest.mark.parametrize(
    ("experts", "scale_dtype"),
    [("fp4", torch.float8_e8m0fnu), ("fp4", torch.float32), ("fp8", torch.float32), ("fp8", torch.float8_e8m0fnu)],
)
def test_against_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: Experts, scale_dtype: torch.dtype
) -> None:
    directory = write_native(tmp_path, SPEC, experts, scale_dtype)
    oracle = dequantised_by_transformers(directory, monkeypatch)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    form = format_of(FP8_CONFIG)
    kinds: dict[str, int] = {}
    for module, leaves in modules.items():
        if "weight" not in leaves:
            continue
        scheme = form.describe(FP8_CONFIG, module, headers(leaves))
        kinds[scheme.kind] = kinds.get(scheme.kind, 0) + 1
        want = oracle[f"{module}.weight"]
        assert torch.equal(form.dequantise(leaves, scheme), want), module
        assert torch.equal(dequantise(form.repack(leaves, scheme), scheme), want), module
    experts_of_model = 3 * SPEC.config.n_routed_experts * SPEC.config.num_hidden_layers
    if experts == "fp4":
        assert kinds["fp4"] == experts_of_model
        assert kinds["fp8"] > 8 * SPEC.config.num_hidden_layers - 1
    else:
        assert kinds["fp8"] > experts_of_model
        assert "fp4" not in kinds
    assert kinds["plain"]
