"""The checkpoints of `testing/data`, written by the public tools, module by module.

`NAME/` is a whole checkpoint and `NAME.ref/` has what the tool's own library makes of it: the SHA-256 of every
dequantised weight (fp32, contiguous, [out, in]) and transformers' logits with those weights. `partial/NAME` has
one layer's packed modules of a checkpoint and their hashes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_deepseek_v4flash.checkpoint.formats.common import header_of
from vllm_deepseek_v4flash.checkpoint.names import native_name
from vllm_deepseek_v4flash.ops.packed_weight import TensorHeader

DATA = Path(__file__).resolve().parent / "data"
WHOLE = ("ar_sym", "ar_awq_asym", "gm_gptq_desc_act", "llmc_rtn_g32_asym")
PARTIAL = ("gm_rtn_awq_asym", "llmc_gptq")


@dataclass(frozen=True)
class Fixture:
    """One checkpoint: its `quantization_config`, leaves by module, and the tool's hashes by module."""

    config: dict[str, Any]
    modules: dict[str, dict[str, torch.Tensor]]
    hashes: dict[str, str]


@cache
def fixture(name: str) -> Fixture:
    directory, reference = (DATA / name, DATA / f"{name}.ref") if name in WHOLE else (DATA / "partial" / name,) * 2
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for stored, tensor in load_file(directory / "model.safetensors").items():
        native = native_name(stored)
        assert native is not None, stored
        module, _, leaf = native.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    entries = json.loads((reference / "dequant.json").read_text())
    hashes = {weight.removesuffix(".weight"): entry["sha256"] for weight, entry in entries.items()}
    return Fixture(config, modules, hashes)


def headers(leaves: dict[str, torch.Tensor]) -> dict[str, TensorHeader]:
    return {name: header_of(tensor) for name, tensor in leaves.items()}


def sha256(weight: torch.Tensor) -> str:
    assert weight.dtype == torch.float32
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
