"""Kernels to programs: a handler of the executor, operands and constants for every instruction."""

from __future__ import annotations

from dataclasses import dataclass

from . import flow
from .layout import BRANCH, Encoded, Layout, UnsupportedError
from .opcodes import Opcodes
from .parse import Kernel


@dataclass
class Program:
    """A kernel for blocks of one shape."""

    kernel: Kernel
    instructions: list[Encoded]
    registers_size: int
    """Bytes of a warp, constants included."""
    constants_at: int
    constants: bytes
    special: list[int]
    """Offsets of the registers of `SPECIAL`, or NONE."""
    shared_size: int
    """Bytes of the arrays that the kernel declares; dynamic memory follows them."""
    local_size: int
    buffers: list[object]
    """Memory of the kernel's global arrays, to which constants point."""


def encode(kernel: Kernel, threads: tuple[int, int, int]) -> Program:
    """The kernel's program for blocks of that shape.

    Raises:
        UnsupportedError: names every opcode without a handler.
    """
    blocks = flow.blocks(kernel)
    meets = flow.reconvergence(blocks)
    layout = Layout(kernel, threads, blocks)
    opcodes = Opcodes(layout)
    encoded: list[Encoded] = []
    unsupported: dict[str, str] = {}
    for block, meet in zip(blocks, meets, strict=True):
        for instruction in kernel.instructions[block.first : block.end]:
            try:
                one = opcodes.encode(instruction)
            except UnsupportedError as error:
                unsupported.setdefault(instruction.opcode, f"{error}: {instruction.text}")
                continue
            if instruction.guard is not None:
                one.guard, one.guard_negated = layout.offsets[instruction.guard.name], instruction.guard.negated
            if one.flow == BRANCH:
                one.target = flow.target(kernel, instruction)
                one.reconverge = -1 if meet is None else blocks[meet].first
            encoded.append(one)
    if unsupported:
        raise UnsupportedError("; ".join(unsupported.values()))
    return Program(
        kernel, encoded, layout.constants_at + len(layout.constant_bytes), layout.constants_at,
        bytes(layout.constant_bytes), layout.special, layout.shared_size, layout.local_size, layout.buffers,
    )  # fmt: skip
