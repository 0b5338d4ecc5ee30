"""How long a launch and a whole step take: an estimate from counts, not a measurement.

A launch takes `LAUNCH_US` plus the longest of: its bytes at `DRAM_SHARE` of the data sheet's bandwidth; each unit's
instructions at the unit's full rate on the busiest multiprocessor; and all instructions, of which a scheduler issues
`PER_WARP` a clock for each warp it holds, up to `MOST_ISSUED`. Launches do not overlap.

The constants are those of NVIDIA's tables and of published measurements on A100 (streams reach 80 % of the bandwidth,
small graph nodes take 2 us). None was measured with these kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from testing.flash import FLASH_CONFIG
from testing.ptxrun.gpus import GPUS, SCHEDULERS, Gpu
from testing.ptxrun.profile import Profile
from vllm_deepseek_v4flash.config import LayerKind

from .. import floor
from .layer import Point
from .trace import AllReduce, Call, Launch, TorchLaunch

LAUNCH_US = 2.0
DRAM_SHARE = 0.8
PRODUCT_SHARE = 0.7
"""Of the tensor cores' rate that cuBLAS reaches with many rows."""
PER_WARP, MOST_ISSUED = 0.35, 0.72

FAMILIES = ("experts", "linears", "attention", "indexer", "compressor", "mHC", "all-reduce", "head", "other")
_FAMILY_OF = {
    "packed_experts": "experts", "fused_experts": "experts", "route": "experts",
    "packed_linear": "linears", "merged_linear": "linears", "grouped_linear": "linears", "linear_fp32": "linears",
    "sparse_attention": "attention", "qnorm_rope_kv_insert": "attention", "indexer_topk": "indexer",
    "compress": "compressor", "mhc_post_pre": "mHC", "mhc_pre": "mHC", "mhc_post": "mHC",
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Tensor-parallel GPUs of one kind."""

    gpu: Gpu
    ranks: int
    all_reduce_us: float
    """Of a small tensor."""
    link_gb: float
    """GB/s at which a rank sends and receives in a large all-reduce."""

    def __str__(self) -> str:
        return f"{self.ranks}x {self.gpu.name}"


MACHINES = (
    Machine(GPUS["A100"], 2, 6.0, 230.0),
    Machine(GPUS["H100"], 2, 5.0, 360.0),
    Machine(GPUS["RTX 3090"], 8, 25.0, 10.0),
    Machine(GPUS["RTX 4090"], 4, 20.0, 20.0),
)


def launch_us(launch: Launch, machine: Machine) -> float:
    """Microseconds of one launch."""
    gpu, ranks = machine.gpu, machine.ranks
    if isinstance(launch, AllReduce):
        return machine.all_reduce_us + 2 * (ranks - 1) / ranks * launch.bytes / machine.link_gb / 1e3
    if isinstance(launch, TorchLaunch):
        return LAUNCH_US + max(_dram_us(launch.bytes, gpu), launch.flops / (PRODUCT_SHARE * gpu.mma_gflops) / 1e3)
    return LAUNCH_US + max(limits(launch, gpu).values())


def limits(launch: Profile, gpu: Gpu) -> dict[str, float]:
    """The microseconds that each unit needs; a launch waits for the slowest."""
    return launch.bounds_us(gpu) | {"DRAM": _dram_us(launch.traffic.moved, gpu), "issue": _issue_us(launch, gpu)}


def _dram_us(moved: float, gpu: Gpu) -> float:
    return moved / (DRAM_SHARE * gpu.dram_gb) / 1e3


def _issue_us(launch: Profile, gpu: Gpu) -> float:
    """All instructions at the rate that the warps at hand allow."""
    per_multiprocessor = math.ceil(launch.blocks / gpu.multiprocessors)
    held = min(max(1, launch.resident(gpu)), per_multiprocessor) * launch.warps / SCHEDULERS
    issued = launch.instructions * per_multiprocessor / launch.blocks / SCHEDULERS
    return issued / min(MOST_ISSUED, PER_WARP * held) / gpu.ghz / 1e3


@dataclass(frozen=True)
class Step:
    """An estimated step of all layers."""

    point: Point
    families: Mapping[str, float]
    """Microseconds."""
    launches: int
    floor_us: float
    """The bytes and operations that no implementation avoids (`benchmarks/floor.py`), at the data sheet's rates."""

    @property
    def us(self) -> float:
        return sum(self.families.values())


def step(machine: Machine, point: Point, layers: Mapping[LayerKind, Sequence[Call]]) -> Step:
    """All layers, and the head for the last token of each request."""
    families = dict.fromkeys(FAMILIES, 0.0)
    launches = 0
    for kind, calls in layers.items():
        count = layer_counts()[kind]
        for call in calls:
            for launch in call.launches:
                family = "all-reduce" if isinstance(launch, AllReduce) else _FAMILY_OF.get(call.op, "other")
                families[family] += count * launch_us(launch, machine)
                launches += count * (not isinstance(launch, AllReduce))
    head = FLASH_CONFIG.vocab_size * FLASH_CONFIG.hidden_size // machine.ranks
    families["head"] = launch_us(TorchLaunch("product", 2 * head, 2 * head * point.requests), machine)
    return Step(point, families, launches, _floor_us(machine, point))


def layer_counts() -> dict[LayerKind, int]:
    """How many of Flash's layers are of each kind."""
    return {kind: FLASH_CONFIG.layer_kinds[: FLASH_CONFIG.num_hidden_layers].count(kind) for kind in LayerKind}


def memory_gb(machine: Machine, point: Point) -> float:
    """GB that a GPU needs at least: its part of the weights, and the entries of all requests."""
    cached = point.requests * floor.cache_bytes(floor.FLASH_LAYERS, point.context + point.new)
    return (floor.weight_bytes(floor.FLASH_LAYERS) / machine.ranks + cached) / 1e9


def _floor_us(machine: Machine, point: Point) -> float:
    """Work divided over the ranks without communication."""
    gpu = machine.gpu
    if point.prefill:
        cost = floor.prefill(floor.FLASH_LAYERS, point.new, point.new)
    else:
        cost = floor.decode(floor.FLASH_LAYERS, point.requests, point.context)
    return 1e6 * (cost * (1 / machine.ranks)).seconds(gpu.dram_gb, gpu.mma_gflops / 1e3)
