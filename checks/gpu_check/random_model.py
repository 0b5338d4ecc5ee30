"""DeepSeek-V4-Flash at its real widths, with as many layers as fit and random weights that exist on the device only.

The directory that vLLM reads has config.json and safetensors files with headers and no data: from these vLLM and
`inspect` know how each weight is packed. A custom loader fills the parameters in place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from testing import flash as headers
from testing.tiny import BASE
from vllm_deepseek_v4flash.config import DeepseekV4Config
from vllm_deepseek_v4flash.inspect.capacity import Capacity, Limits, activation_bytes, cache_pool, plan_capacity
from vllm_deepseek_v4flash.inspect.contents import inspect_checkpoint
from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats

from .results import NotRunError

LOAD_FORMAT = "gpu_check_random"
UTILIZATION = 0.92
GRAPHS = 2 << 30
"""Bytes for CUDA graphs, which `inspect` does not count."""
# Widths small enough for Triton's interpreter, and multiples of groups of 32 and blocks of 128.
TINY: dict[str, Any] = BASE | {
    "hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 128, "qk_rope_head_dim": 64, "q_lora_rank": 128,
    "o_lora_rank": 64, "index_head_dim": 128, "index_topk": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One window layer, then `pairs` of a CSA and an HCA layer."""

    pairs: int
    dry: bool

    @property
    def layers(self) -> dict[str, int]:
        return {"window": 1, "CSA": self.pairs, "HCA": self.pairs}

    @property
    def count(self) -> int:
        return 1 + 2 * self.pairs

    @property
    def values(self) -> dict[str, Any]:
        """config.json. The last ratio is the MTP block's, which is not loaded."""
        layers = {"num_hidden_layers": self.count, "compress_ratios": [0, *[4, 128] * self.pairs, 0]}
        return copy.deepcopy({**(TINY if self.dry else headers.FLASH), **layers, "num_hash_layers": 1})

    @property
    def config(self) -> DeepseekV4Config:
        return DeepseekV4Config.from_dict(self.values)


def write(directory: Path, shape: Shape, native: bool = False) -> Path:
    """native: FP8 weights and FP4 experts, DeepSeek's format; otherwise 4-bit integers in groups of 128 (dry: 32)."""
    values = shape.values
    if native:
        return headers.write_checkpoint(directory, values, headers.native(values), headers.NATIVE_QUANTIZATION)
    group, quantization = 32 if shape.dry else 128, copy.deepcopy(headers.PACKED_QUANTIZATION)
    quantization["config_groups"]["group_0"]["weights"]["group_size"] = group
    return headers.write_checkpoint(directory, values, headers.pack_quantized(values, group=group), quantization)


def limits(memory: int, batch: int) -> Limits:
    return Limits(1, memory, UTILIZATION, max_num_seqs=batch)


def capacity(directory: Path, shape: Shape, memory: int, batch: int) -> Capacity:
    """The report of `inspect` without options, which means fp8 rows."""
    report = inspect_checkpoint(directory)
    if report.problems:
        raise AssertionError(f"`inspect` refuses the made-up checkpoint: {report.problems[0]}")
    return plan_capacity(report.config, report.resident, formats(shape), limits(memory, batch))


def formats(shape: Shape) -> CacheFormats:
    return CacheFormats.select(shape.config, "auto", "auto", torch.bfloat16)


def choose(scratch: Path, memory: int, batch: int, context: int, chunk: int) -> Shape:
    """As many of Flash's layers as leave room for `batch` requests of `context` tokens and steps of `chunk` tokens.

    Counts the weights of the larger of both formats, so that `width` and `peer` have the same number of layers.

    Raises:
        NotRunError: three layers do not fit.
    """
    weights = []
    for native in (False, True):
        sizes = []
        for pairs in (1, 2):
            directory = write(scratch / f"{'native' if native else 'int4'}-{pairs}", Shape(pairs, False), native)
            sizes.append(capacity(directory, Shape(pairs, False), memory, batch).weights)
        weights.append((sizes[0], sizes[1] - sizes[0]))
    for pairs in range(21, 0, -1):
        shape = Shape(pairs, False)
        pool = cache_pool(shape.config, formats(shape))
        needed = max(first + (pairs - 1) * pair for first, pair in weights)
        needed += activation_bytes(shape.config, limits(memory, batch), chunk) + GRAPHS
        needed += pool.block_bytes * (batch * pool.blocks(context, 1) + pool.blocks(context, chunk))
        if needed <= memory * UTILIZATION:
            return shape
    raise NotRunError(f"{memory / 2**30:.0f} GiB do not hold three layers with {batch} requests of {context} tokens")


def register_loader(record: dict[str, int]) -> str:
    """Register a load format that calls `fill`; returns its name. record: receives the bytes of the weights."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class RandomWeights(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            fill(model)
            stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
            record["weights"] = sum(stored.values())

    register_model_loader(LOAD_FORMAT)(RandomWeights)
    return LOAD_FORMAT


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Fill with random values such that a layer's output is about as large as its input and nothing overflows."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        fill_one(name, parameter.data, model)


def fill_one(name: str, data: torch.Tensor, model: torch.nn.Module) -> None:
    leaf = name.rpartition(".")[2]
    if leaf == "tid2eid":
        config = getattr(model, "config", None)
        experts = getattr(config, "n_routed_experts", None) or 256
        scores = torch.rand((data.shape[0], experts), device=data.device)
        data.copy_(scores.topk(data.shape[1]).indices)
    elif (data.dtype == torch.uint8 and "scale" in leaf) or data.dtype == torch.float8_e8m0fnu:
        # Powers of two near 2^-8: e2m1 values are around 2, and sums have some thousand products.
        data.view(torch.uint8).random_(118, 120)
    elif data.dtype == torch.float8_e4m3fn:
        # Magnitudes around 1 with both signs, and no NaN.
        codes = data.view(torch.uint8)
        codes.random_(0x30, 0x40).bitwise_or_(torch.randint(0, 2, codes.shape[-1:], device=data.device).byte() << 7)
    elif not data.is_floating_point():
        # Codes fill all bits of a word, whatever its size.
        data.view(torch.uint8).random_(0, 256)
    elif "norm" in name:
        data.fill_(1.0)
    elif "scale" in leaf and "hc_" not in leaf:
        # 4-bit codes minus 8 have a standard deviation of 4.6, and rows have some thousand.
        data.uniform_(0.5, 1.5).mul_(1 / (4.6 * 64))
    elif leaf.endswith("_scale"):
        data.fill_(1.0)
    elif data.ndim < 2:
        data.normal_(0.0, 0.3)
    else:
        data.normal_(0.0, 1.0 if "embed" in name else data.shape[-1] ** -0.5)
