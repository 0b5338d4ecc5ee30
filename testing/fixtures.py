"""The checkpoints of `testing/data/checkpoints.tar.xz`, written by the public tools, module by module.

`NAME/` is a whole checkpoint and `NAME.ref/` has what the tool's own library makes of it: the SHA-256 of every
dequantised weight (fp32, contiguous, [out, in]) and transformers' logits with those weights. `partial/NAME` has
one layer's packed modules of a checkpoint and their hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_deepseek_v4flash.checkpoint.dtypes import header_of
from vllm_deepseek_v4flash.checkpoint.headers import TensorHeader
from vllm_deepseek_v4flash.checkpoint.names import native_name

ARCHIVE = Path(__file__).resolve().parent / "data" / "checkpoints.tar.xz"
WHOLE = ("ar_sym", "ar_awq_asym", "gm_gptq_desc_act", "llmc_rtn_g32_asym")
PARTIAL = ("gm_rtn_awq_asym", "llmc_gptq", "ar016_asym", "ar016_asym_override", "gm_embedding")


@dataclass(frozen=True)
class Fixture:
    """One checkpoint: its `quantization_config`, leaves by module, and the tool's hashes by module."""

    config: dict[str, Any]
    modules: dict[str, dict[str, torch.Tensor]]
    hashes: dict[str, str]


@cache
def unpacked() -> Path:
    """The directory with the checkpoints, below the user's cache. Whichever process needs it first unpacks the archive.

    Its name depends on the archive's content, and it appears with one rename: it is complete where it exists.

    Raises:
        OSError: the cache directory cannot be written.
        tarfile.FilterError: a member of the archive would be written outside the directory.
    """
    digest = hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-deepseek-v4flash"
    target = cache_home / f"checkpoints-{digest[:16]}"
    if target.is_dir():
        return target
    cache_home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_home) as scratch:
        made = Path(scratch) / "checkpoints"
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(made, filter="data")
        try:
            made.rename(target)
        except OSError:
            # Another process was faster, unless the target is still not there.
            if not target.is_dir():
                raise
    return target


@cache
def fixture(name: str) -> Fixture:
    directory, reference = (name, f"{name}.ref") if name in WHOLE else (f"partial/{name}",) * 2
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for stored, tensor in load_file(unpacked() / directory / "model.safetensors").items():
        native = native_name(stored)
        assert native is not None, stored
        module, _, leaf = native.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    config = json.loads((unpacked() / directory / "config.json").read_text())["quantization_config"]
    entries = json.loads((unpacked() / reference / "dequant.json").read_text())
    hashes = {weight.removesuffix(".weight"): entry["sha256"] for weight, entry in entries.items()}
    return Fixture(config, modules, hashes)


def headers(leaves: dict[str, torch.Tensor]) -> dict[str, TensorHeader]:
    return {name: header_of(tensor) for name, tensor in leaves.items()}


def sha256(weight: torch.Tensor) -> str:
    assert weight.dtype == torch.float32
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
