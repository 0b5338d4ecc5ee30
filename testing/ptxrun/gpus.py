"""What a GPU's multiprocessors hold and execute per clock, from NVIDIA's tables: the basis of lower bounds.

Sources: CUDA C++ Programming Guide, "Arithmetic Instructions" and "Technical Specifications per Compute Capability";
the architecture whitepapers of GA100, GA102, AD102, GH100 and GB202 for clocks, bandwidths and tensor rates.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65536  # of a multiprocessor
REGISTER_UNIT = 256  # a warp's are allocated in so many
RESERVED_SHARED = 1024  # bytes that each block takes for the system
SCHEDULERS = 4


@dataclass(frozen=True)
class Gpu:
    """Rates are warp instructions per clock and multiprocessor."""

    name: str
    arch: int
    multiprocessors: int
    ghz: float
    """Boost clock."""
    dram_gb: float
    """GB/s."""
    mma: float
    """Products of 16 x 8 x 16 in bf16 with fp32 sums."""
    fma: float
    warps: int
    """That a multiprocessor holds."""
    blocks: int
    shared_kb: int
    memory_gb: int
    alu: float = 2.0
    xu: float = 0.5
    l2_bytes: float = 64.0
    """Per clock and multiprocessor."""

    @property
    def rates(self) -> dict[str, float]:
        """By unit, as `machine_code` calls them."""
        units = {"alu": self.alu, "fma": self.fma, "xu": self.xu, "mma": self.mma}
        return units | {"shared": 1.0, "shuffle": 1.0, "global": 1.0}

    @property
    def mma_gflops(self) -> float:
        """GFLOP/s of bf16 products on the tensor cores."""
        return self.mma * 2 * 16 * 8 * 16 * self.multiprocessors * self.ghz

    def blocks_per_multiprocessor(self, warps: int, registers: int, shared: int) -> int:
        """How many blocks of so many warps fit at the same time.

        Args:
            registers: of a thread.
            shared: bytes of a block.
        """
        per_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
        by_shared = self.shared_kb * 1024 // (shared + RESERVED_SHARED)
        return max(0, min(self.blocks, self.warps // warps, by_registers, by_shared))


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 1.41, 2039, mma=0.5, fma=2.0, warps=64, blocks=32, shared_kb=164, memory_gb=80),
        Gpu("RTX 3090", 86, 82, 1.695, 936, mma=0.125, fma=4.0, warps=48, blocks=16, shared_kb=100, memory_gb=24),
        Gpu("RTX 4090", 89, 128, 2.52, 1008, mma=0.125, fma=4.0, warps=48, blocks=24, shared_kb=100, memory_gb=24),
        Gpu("H100", 90, 132, 1.755, 3350, mma=1.0, fma=4.0, warps=64, blocks=32, shared_kb=228, memory_gb=80),
        Gpu("L40S", 89, 142, 2.52, 864, mma=0.25, fma=4.0, warps=48, blocks=24, shared_kb=100, memory_gb=48),
        Gpu("RTX 5090", 120, 170, 2.407, 1792, mma=0.125, fma=4.0, warps=48, blocks=24, shared_kb=100, memory_gb=32),
    )
}
