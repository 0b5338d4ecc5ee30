"""Kernels that can be launched on CPU memory, and what a launch did."""

from __future__ import annotations

import ctypes
import enum
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import library
from .encode import Program, encode
from .layout import UnsupportedError
from .library import Stat
from .parse import Instruction, Kernel, SourceLine

MOST_FINDINGS = 256


class Fault(enum.Enum):
    """What a GPU would not do, or would do differently from run to run; in the order of machine.h's `Fault`."""

    GLOBAL_OUT_OF_BOUNDS = "global access outside of every tensor"
    MISALIGNED = "misaligned access"
    SHARED_OUT_OF_BOUNDS = "shared access outside of the block's memory"
    SHARED_UNINITIALISED = "read of uninitialised shared memory"
    SHARED_RACE = "race between warps on shared memory"
    WARP_HAZARD = "lanes of a warp share memory without bar.warp.sync"
    PENDING_COPY_READ = "read of a copy's destination before its wait"
    PENDING_COPY_WRITE = "write to a copy's destination before its wait"
    INCOMPLETE_BARRIER = "barrier that not all live lanes reach"
    INCOMPLETE_WARP = "warp operation that not all its lanes reach"
    UNWAITED_COPY = "copy that is never waited for"
    ENDLESS = "warp that does not end"


class WarpOrder(enum.IntEnum):
    """In which order a block's warps run; each runs from barrier to barrier."""

    FORWARD = 0
    BACKWARD = 1
    ALTERNATING = 2


@dataclass(frozen=True)
class Schedule:
    """How a launch is run: results must not depend on it."""

    warp_order: WarpOrder = WarpOrder.FORWARD
    blocks_backward: bool = False
    block_step: int = 1
    """Every so many blocks one runs; with more than 1, results are incomplete."""
    check_every: int = 1
    """Every so many blocks one's accesses to shared memory are checked; 0 for none."""


@dataclass(frozen=True)
class Finding:
    """A fault of one instruction: where it first occurred, and how often."""

    fault: Fault
    text: str
    line: int
    """Of the PTX."""
    source: SourceLine | None
    block: int
    warp: int
    lane: int
    address: int
    count: int
    other: str
    """The instruction that accessed the same memory before, for races."""

    def __str__(self) -> str:
        other = f" (against `{self.other}`)" if self.other else ""
        return (
            f"{self.fault.value}: `{self.text}` at {place(self.source)}, PTX line {self.line}, block {self.block} "
            f"warp {self.warp} lane {self.lane} address {self.address:#x}, {self.count} times{other}"
        )


@dataclass
class Memory:
    """Bytes that a kernel may access, and which sectors of 32 bytes a launch touched, a bit each."""

    base: int
    size: int
    name: str = ""
    read: bytearray = field(default_factory=bytearray)
    written: bytearray = field(default_factory=bytearray)


@dataclass
class Result:
    """What a launch did."""

    program: Program
    stats: list[Stat]
    """Per instruction."""
    findings: list[Finding]
    seconds: float
    """Of CPU time."""
    blocks: int
    warps: int
    """Per block."""
    memory: list[Memory]

    @property
    def thread_instructions(self) -> int:
        return sum(stat.lanes for stat in self.stats)


class Executable:
    """One kernel, for blocks of one shape.

    Raises:
        UnsupportedError: names the instructions that the executor does not support.
    """

    def __init__(self, kernel: Kernel, threads: tuple[int, int, int]) -> None:
        self.program = program = encode(kernel, threads)
        self.threads = threads
        operands = [offset for one in program.instructions for offset in one.operands]
        widths = [width for one in program.instructions for width in one.widths]
        self._operands = (ctypes.c_uint32 * max(len(operands), 1))(*operands)
        self._widths = (ctypes.c_uint8 * max(len(widths), 1))(*widths)
        self._instructions = (library.Instruction * len(program.instructions))()
        at = 0
        unknown: dict[str, str] = {}
        for to, one, source in zip(self._instructions, program.instructions, kernel.instructions, strict=True):
            to.handler = library.library().ptxrun_handler(one.handler.encode())
            if not to.handler:
                unknown.setdefault(one.handler, source.text)
            to.operand = ctypes.addressof(self._operands) + 4 * at
            to.width = ctypes.addressof(self._widths) + at
            to.operands = len(one.operands)
            at += len(one.operands)
            for name in (
                "immediate", "target", "reconverge", "guard", "guard_negated", "flow", "space", "size", "vector",
                "is_signed", "modifier",
            ):  # fmt: skip
                setattr(to, name, getattr(one, name))
        if unknown:
            raise UnsupportedError("; ".join(f"{handler}: {text}" for handler, text in unknown.items()))

    def launch(
        self,
        grid: tuple[int, int, int],
        parameters: bytes,
        dynamic_shared: int,
        memory: Iterable[Memory],
        schedule: Schedule | None = None,
    ) -> Result:
        """Run a grid.

        Args:
            parameters: as the kernel's parameters are laid out.
            dynamic_shared: bytes of shared memory beyond the arrays that the kernel declares.
            memory: all that it may access.
        """
        schedule = Schedule() if schedule is None else schedule
        program = self.program
        known = [replace(m) for m in memory if m.size]
        allocations = _allocations(known)
        stats = (Stat * len(self._instructions))()
        findings = (library.Finding * MOST_FINDINGS)()
        constants = (ctypes.c_uint8 * max(len(program.constants), 1)).from_buffer_copy(program.constants or b"\0")
        given = (ctypes.c_uint8 * max(len(parameters), 16)).from_buffer_copy(parameters.ljust(16, b"\0"))
        blocks = grid[0] * grid[1] * grid[2]
        launch = library.Launch(
            ctypes.addressof(self._instructions), ctypes.addressof(stats), ctypes.addressof(constants),
            ctypes.addressof(given), ctypes.addressof(allocations), ctypes.addressof(findings),
            program.registers_size, program.constants_at, len(program.constants),
            -(-program.shared_size // 16) * 16 + dynamic_shared, program.local_size,
            (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*self.threads),
            (ctypes.c_uint32 * 15)(*program.special), len(known), len(self._instructions), 0, len(findings),
            schedule.check_every, schedule.warp_order, schedule.blocks_backward, blocks, schedule.block_step, 0,
        )  # fmt: skip
        started = time.thread_time()
        library.library().ptxrun_launch(ctypes.addressof(launch))
        seconds = time.thread_time() - started
        found = [self._finding(finding) for finding in findings[: launch.finding_count]]
        warps = -(-self.threads[0] * self.threads[1] * self.threads[2] // 32)
        return Result(program, list(stats), found, seconds, -(-blocks // schedule.block_step), warps, known)

    def _finding(self, found: library.Finding) -> Finding:
        instructions = self.program.kernel.instructions
        instruction = instructions[found.instruction]
        other = _described(instructions[found.other]) if found.other >= 0 else ""
        return Finding(
            list(Fault)[found.fault], instruction.text, instruction.line, instruction.source, found.block, found.warp,
            found.lane, found.address, found.count, other,
        )  # fmt: skip


def _allocations(memory: list[Memory]) -> ctypes.Array[library.Allocation]:
    """The memory as the executor takes it, with its marks of touched sectors cleared."""
    allocations = (library.Allocation * max(len(memory), 1))()
    for to, m in zip(allocations, memory, strict=False):
        to.base, to.size = m.base, m.size
        bits = (m.size // 32 + 2) // 8 + 1
        m.read, m.written = bytearray(bits), bytearray(bits)
        to.read, to.written = (
            ctypes.addressof((ctypes.c_uint8 * bits).from_buffer(array)) for array in (m.read, m.written)
        )
    return allocations


def place(source: SourceLine | None) -> str:
    """A line of the source, as findings and profiles write it."""
    return "?" if source is None else f"{Path(source[0]).name}:{source[1]}"


def _described(instruction: Instruction) -> str:
    return instruction.text if instruction.source is None else f"{instruction.text} at {place(instruction.source)}"
