"""What a launch did: instructions, memory traffic and bank conflicts of its whole grid, and what that takes at least.

Where only some blocks ran (`Schedule.block_step`), their counts are scaled to the grid.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from .executable import Result, place
from .gpus import SCHEDULERS, Gpu
from .library import Stat
from .machine_code import assemble, issued
from .parse import Instruction
from .triton_kernels import Run

SECTOR = 32  # bytes that global memory moves at least
WASTEFUL = 1.5
"""An access is reported where it moves more than so many times what it asks for."""
WORST = 3


@dataclass(frozen=True)
class Traffic:
    """Of global memory."""

    requests: float = 0.0
    """Instructions of warps."""
    sectors: float = 0.0
    asked: float = 0.0
    """Bytes that the lanes asked for."""
    moved: float = 0.0
    """Bytes that DRAM must deliver or take: the sectors that were touched, each once; scaled to the grid, but no more
    than each tensor has."""

    @property
    def wasted(self) -> float:
        """The part of the moved bytes that was not asked for."""
        moved = SECTOR * self.sectors
        return max(0.0, 1 - self.asked / moved) if moved else 0.0


@dataclass(frozen=True)
class Profile:
    """One launch. Counts are those of the whole grid."""

    kernel: str
    blocks: int
    ran: int
    """Blocks that were executed."""
    warps: int
    """Per block."""
    registers: int
    shared: int
    """Bytes per block."""
    issued: dict[str, float]
    """Machine instructions of warps by unit (`machine_code.issued`)."""
    traffic: Traffic
    wavefronts: float
    """Clocks that shared memory is busy."""
    ideal_wavefronts: float
    """The same without bank conflicts."""
    barriers: float
    in_flight: float
    """Bytes per block that asynchronous copies have on their way at most: a group's bytes times the groups not waited
    for."""
    worst: list[str] = field(default_factory=list)
    """The accesses that waste most."""

    @property
    def instructions(self) -> float:
        return sum(self.issued.values())

    def resident(self, gpu: Gpu) -> int:
        """Blocks that a multiprocessor holds at the same time."""
        return gpu.blocks_per_multiprocessor(self.warps, self.registers, self.shared)

    def waves(self, gpu: Gpu) -> float:
        """How often the GPU is filled with blocks."""
        return self.blocks / (max(1, self.resident(gpu)) * gpu.multiprocessors)

    def bounds_us(self, gpu: Gpu) -> dict[str, float]:
        """Microseconds that each unit of the busiest multiprocessor needs at least, blocks spread evenly."""
        share = math.ceil(self.blocks / gpu.multiprocessors) / self.blocks
        clocks = {unit: self.issued.get(unit, 0.0) / rate for unit, rate in gpu.rates.items()}
        clocks["issue"] = self.instructions / SCHEDULERS
        clocks["shared"] = max(clocks["shared"], self.wavefronts)
        clocks["L2"] = SECTOR * self.traffic.sectors / gpu.l2_bytes
        return {unit: count * share / gpu.ghz / 1e3 for unit, count in clocks.items()}


def profile(run: Run) -> Profile:
    """Of an executed launch."""
    result, blocks = run.result, math.prod(run.grid)
    scale = blocks / result.blocks
    requests = sectors = asked = wavefronts = ideal = barriers = 0.0
    for instruction, stat in zip(result.program.kernel.instructions, result.stats, strict=True):
        if instruction.opcode.startswith("bar.sync"):
            barriers += stat.executed
        if stat.lines:
            requests, sectors, asked = requests + stat.executed, sectors + stat.sectors, asked + stat.bytes
        wavefronts, ideal = wavefronts + stat.wavefronts, ideal + stat.ideal_wavefronts
    code = assemble(run.ptx, result.program.kernel.name)
    return Profile(
        run.kernel,
        blocks,
        result.blocks,
        result.warps,
        code.registers,
        code.shared + run.shared,
        {unit: count * scale for unit, count in issued(result, run.ptx).items()},
        Traffic(requests * scale, sectors * scale, asked * scale, _moved(result, scale)),
        wavefronts * scale,
        ideal * scale,
        barriers * scale / result.warps,
        _in_flight(result),
        _worst(result),
    )


def _moved(result: Result, scale: float) -> float:
    return sum(
        min(float(memory.size), scale * SECTOR * int.from_bytes(marks, "little").bit_count())
        for memory in result.memory
        for marks in (memory.read, memory.written)
    )


def _in_flight(result: Result) -> float:
    """Bytes of asynchronous copies per block; 0 where there are none."""
    copied = groups = 0
    pending = 0
    for instruction, stat in zip(result.program.kernel.instructions, result.stats, strict=True):
        opcode = instruction.opcode
        if opcode.startswith("cp.async.commit_group"):
            groups += stat.executed
        elif opcode.startswith("cp.async.wait_group") and stat.executed:
            found = re.search(r"(\d+)\s*;?\s*$", instruction.text)
            pending = max(pending, int(found[1]) if found else 0)
        elif opcode.startswith("cp.async.c"):
            copied += stat.bytes
    if not groups:
        return 0.0
    # A block's group is what its warps commit together.
    return copied / (groups / result.warps) * (pending + 1)


def _worst(result: Result) -> list[str]:
    scattered: list[tuple[float, str]] = []
    conflicting: list[tuple[float, str]] = []
    for instruction, stat in zip(result.program.kernel.instructions, result.stats, strict=True):
        if stat.lines and SECTOR * stat.sectors > WASTEFUL * stat.bytes:
            scattered.append((SECTOR * stat.sectors - stat.bytes, _scattered(instruction, stat)))
        if stat.wavefronts > stat.ideal_wavefronts:
            conflicting.append((stat.wavefronts - stat.ideal_wavefronts, _conflicting(instruction, stat)))
    return [text for kind in (scattered, conflicting) for _, text in sorted(kind, reverse=True)[:WORST]]


def _scattered(instruction: Instruction, stat: Stat) -> str:
    sectors, asked = stat.sectors / stat.executed, stat.bytes / stat.executed
    return f"{sectors:.1f} sectors for {asked:.0f} B: `{instruction.opcode}` at {place(instruction.source)}"


def _conflicting(instruction: Instruction, stat: Stat) -> str:
    found, ideal = stat.wavefronts / stat.executed, stat.ideal_wavefronts / stat.executed
    return f"{found:.1f} wavefronts where {ideal:.1f} would do: `{instruction.opcode}` at {place(instruction.source)}"
