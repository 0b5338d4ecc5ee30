"""Where a kernel's registers, constants and arrays are stored, and how the executor finds an instruction's operands."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field

from . import flow
from .parse import Address, Array, Immediate, Kernel, Operand, Register, Sink, Symbol, size_of

LANES = 32
NONE = 0xFFFFFFFF
NEXT, BRANCH, EXIT, BARRIER = range(4)  # machine.h's Flow
SPACES = {"global": 0, "shared": 1, "param": 2, "local": 3, "const": 0}  # machine.h's Space
GENERIC = 4
# Where generic addresses have shared and local memory; memory.h's.
SHARED_WINDOW, LOCAL_WINDOW = 0x7000000000000000, 0x7100000000000000
SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid", "%warpid",
    "%lanemask_lt", "%lanemask_le", "%lanemask_eq", "%lanemask_ge", "%nctaid.x", "%nctaid.y", "%nctaid.z",
)  # fmt: skip
"""Registers that the executor sets per warp, in the order of `Launch::special`."""


class UnsupportedError(Exception):
    """An instruction that the executor has no handler for."""


@dataclass
class Encoded:
    """One instruction, as machine.h's `Instruction` has it."""

    handler: str
    flow: int = NEXT
    operands: list[int] = field(default_factory=list)
    """Offsets into a warp's registers, in bytes."""
    widths: list[int] = field(default_factory=list)
    """Bytes that a lane has of each operand; 0 for a predicate."""
    immediate: int = 0
    target: int = 0
    reconverge: int = -1
    guard: int = NONE
    guard_negated: bool = False
    space: int = 0
    size: int = 0
    vector: int = 0
    is_signed: bool = False
    modifier: int = 0


class Layout:
    """The layout of one kernel for blocks of one shape; grows with the constants that its instructions need."""

    def __init__(self, kernel: Kernel, threads: tuple[int, int, int], blocks: list[flow.Block]) -> None:
        self.kernel, self.threads = kernel, threads
        sizes = {name: 4 if t == "pred" else LANES * size_of(t) for name, t in kernel.registers.items()}
        sizes = {name: -(-size // 32) * 32 for name, size in sizes.items()}
        self.offsets, used = flow.slots(kernel, blocks, sizes)
        self.constants_at = -(-used // 64) * 64
        self.constants: dict[tuple[int, int], int] = {}
        self.constant_bytes = bytearray()
        self.buffers: list[object] = []
        self.special = [NONE] * len(SPECIAL)
        self.symbols: dict[str, int] = dict(kernel.parameter_offsets())
        """Addresses within the symbol's memory space."""
        self.shared_size = self.local_size = 0
        self._place_arrays()

    def _place_arrays(self) -> None:
        dynamic = [array for array in self.kernel.arrays if array.space == "shared" and not array.size]
        for array in self.kernel.arrays:
            if array in dynamic:
                continue
            if array.space == "shared":
                self.symbols[array.name] = at = -(-self.shared_size // array.align) * array.align
                self.shared_size = at + array.size
            elif array.space == "local":
                self.symbols[array.name] = at = -(-self.local_size // array.align) * array.align
                self.local_size = at + array.size
            else:
                self.symbols[array.name] = self._global_array(array)
        for array in dynamic:
            self.symbols[array.name] = -(-self.shared_size // 16) * 16

    def _global_array(self, array: Array) -> int:
        """The address of new memory that holds the array's initial value."""
        data = array.initial.ljust(array.size, b"\0")
        buffer = ctypes.create_string_buffer(len(data) + 64)
        self.buffers.append(buffer)
        at = -(-ctypes.addressof(buffer) // 16) * 16
        ctypes.memmove(at, data, len(data))
        return at

    def constant(self, bits: int, width: int) -> int:
        """The offset of a register that holds `bits` in every lane: a predicate where `width` is 0."""
        key = (bits, width)
        if key not in self.constants:
            self.constants[key] = self.constants_at + len(self.constant_bytes)
            data = bits.to_bytes(width, "little") * LANES if width else struct.pack("<I", NONE if bits else 0)
            self.constant_bytes += data.ljust(-(-len(data) // 32) * 32, b"\0")
        return self.constants[key]

    def width_of(self, register: Register) -> int:
        """Bytes that a lane has of it; 0 for a predicate."""
        type_ = self.kernel.registers.get(register.name)
        return 4 if type_ is None else 0 if type_ == "pred" else size_of(type_)

    def place(self, one: Encoded, operand: Operand, type_: str, exact: bool = True) -> None:
        """Append an operand, read as `type_`; with `exact`, its register must be as wide as the type."""
        width = 0 if type_ == "pred" else size_of(type_)
        match operand:
            case Sink():
                offset = NONE
            case Immediate():
                offset = self.constant(operand.bits("u32" if type_ == "pred" else type_), width)
            case Register(name, negated):
                if negated:
                    raise UnsupportedError("negated predicate operand")
                offset, held = self._register(operand, width)
                if exact and held != width:
                    raise UnsupportedError(f"{name} has {held} bytes, the instruction takes {width}")
                width = held
            case Symbol(name, more):
                offset = self.constant(self.symbols[name] + more, width)
            case _:
                raise UnsupportedError(f"operand {operand}")
        one.operands.append(offset)
        one.widths.append(width)

    def _register(self, register: Register, width: int) -> tuple[int, int]:
        """Offset and bytes per lane."""
        name = register.name
        if name in self.offsets:
            return self.offsets[name], self.width_of(register)
        fixed = {
            "%ntid.x": self.threads[0], "%ntid.y": self.threads[1], "%ntid.z": self.threads[2], "%nwarpid": 32,
            "WARP_SZ": 32, "%smid": 0, "%nsmid": 1, "%clock": 0, "%clock64": 0, "%globaltimer": 0,
        }  # fmt: skip
        if name in fixed:
            return self.constant(fixed[name], width or 4), width or 4
        if name not in SPECIAL:
            raise UnsupportedError(f"special register {name}")
        which = SPECIAL.index(name)
        if self.special[which] == NONE:
            self.special[which] = self.constants_at + len(self.constant_bytes)
            self.constant_bytes += b"\0" * 4 * LANES
        return self.special[which], 4

    def place_all(self, one: Encoded, operands: list[Operand], types: list[str], exact: bool = True) -> None:
        if len(operands) != len(types):
            raise UnsupportedError(f"{len(operands)} operands, not {len(types)}")
        for operand, type_ in zip(operands, types, strict=True):
            self.place(one, operand, type_, exact)

    def place_address(self, one: Encoded, address: Operand) -> None:
        """Append an address's base; its offset becomes the immediate."""
        assert isinstance(address, Address)
        one.immediate = address.offset
        if isinstance(address.base, Register):
            one.operands.append(self.offsets[address.base.name])
            one.widths.append(self.width_of(address.base))
            return
        if address.base is not None:
            one.immediate += self.symbols[address.base.name] + address.base.offset
        one.operands.append(self.constant(0, 8))
        one.widths.append(8)
