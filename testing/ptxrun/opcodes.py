"""How each opcode is encoded: a method per family, by the first part of the opcode.

To support another opcode, add its handler to a table in `native/` under its full name, a method here if its operands
are not "destination, then sources of the last type", and a test in tests/ptxrun.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .layout import (
    BARRIER,
    BRANCH,
    EXIT,
    GENERIC,
    LOCAL_WINDOW,
    SHARED_WINDOW,
    SPACES,
    Encoded,
    Layout,
    UnsupportedError,
)  # fmt: skip
from .parse import Address, Immediate, Instruction, Operand, Pair, Register, Vector, size_of

# Cache hints, and how far an instruction's effects are visible: blocks and warps run one after another, so that all
# effects are visible at once.
_DROPPED = {
    "relaxed", "acquire", "release", "acq_rel", "volatile", "weak", "gpu", "sys", "cta", "cluster", "nc", "ca", "cg",
    "cs", "cv", "lu", "wb", "wt", "L1::evict_last", "L1::evict_first", "L1::evict_normal", "L1::no_allocate",
    "L1::evict_unchanged", "uni", "aligned", "noftz",
}  # fmt: skip


def _items(operand: Operand) -> list[Operand]:
    return list(operand.items) if isinstance(operand, Vector) else [operand]


def _integer(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise UnsupportedError("a register where constants are supported")
    return int(operand.text, 0)


def _number_after(letter: str, parts: list[str], default: int | None = None) -> int:
    """Of `.v4` or `.x2`."""
    found = next((int(p[1:]) for p in parts if re.fullmatch(rf"{letter}\d", p)), default)
    if found is None:
        raise UnsupportedError("shape")
    return found


class Opcodes:
    """Encodes the instructions of one kernel."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.place, self.place_all, self.place_address = layout.place, layout.place_all, layout.place_address

    def encode(self, instruction: Instruction) -> Encoded:
        base, *rest = instruction.opcode.split(".")
        dropped = _DROPPED - {"uni"} if base == "vote" else _DROPPED
        parts = [base, *(part for part in rest if part not in dropped and not part.startswith("L2::"))]
        method: Callable[[Instruction, list[str]], Encoded] | None = getattr(self, f"_{base}", None)
        return method(instruction, parts) if method else self._lanewise(instruction, parts)

    def _lanewise(self, instruction: Instruction, parts: list[str]) -> Encoded:
        """Destination, then sources of the opcode's type, with exceptions."""
        one = Encoded(".".join(parts))
        type_, count = parts[-1], len(instruction.operands)
        types = [type_] * count
        match parts[0]:
            case "shl" | "shr":
                types[2] = "u32"
            case "bfe":
                types[2:] = ["u32", "u32"]
            case "bfi":
                types[3:] = ["u32", "u32"]
            case "popc" | "clz" | "bfind":
                types[0] = "u32"
            case "selp":
                types[3] = "pred"
        if "wide" in parts:
            wide = type_[0] + str(2 * int(type_[1:]))
            types[0] = wide
            if parts[0] == "mad":
                types[3] = wide
        self.place_all(one, instruction.operands, types)
        return one

    def _mov(self, instruction: Instruction, parts: list[str]) -> Encoded:
        to, source = instruction.operands
        type_ = parts[-1]
        if not isinstance(to, Vector) and not isinstance(source, Vector):
            one = Encoded(".".join(parts))
            self.place_all(one, [to, source], [type_, type_])
            return one
        whole, vector = (source, to) if isinstance(to, Vector) else (to, source)
        part = size_of(type_) // len(_items(vector))
        types = [f"b{8 * part}"] * len(_items(vector))
        one = Encoded(f"{'unpack' if vector is to else 'pack'}.{part}.{size_of(type_)}")
        if vector is to:
            self.place_all(one, [*_items(vector), whole], [*types, type_])
        else:
            self.place_all(one, [whole, *_items(vector)], [type_, *types])
        return one

    def _cvta(self, instruction: Instruction, parts: list[str]) -> Encoded:
        window = SHARED_WINDOW if "shared" in parts else LOCAL_WINDOW if "local" in parts else 0
        one = Encoded("sub.u64" if "to" in parts else "add.u64")
        self.place_all(one, [*instruction.operands, Immediate(str(window))], ["u64"] * 3)
        return one

    def _setp(self, instruction: Instruction, parts: list[str]) -> Encoded:
        combine = next((p for p in parts if p in ("and", "or", "xor")), None)
        kept = [p for p in parts if p not in ("and", "or", "xor", "ftz")]
        one = Encoded(".".join(kept), modifier={None: 0, "and": 1, "or": 2, "xor": 3}[combine])
        first, *rest = instruction.operands
        if isinstance(first, Pair):
            self.place_all(one, [first.first, first.second], ["pred", "pred"])
            one.vector = 2
        else:
            self.place(one, first, "pred")
        types = [parts[-1], parts[-1]] + (["pred"] if combine else [])
        self.place_all(one, rest, types)
        return one

    def _cvt(self, instruction: Instruction, parts: list[str]) -> Encoded:
        to, source = parts[-2:]
        rounding = next((p for p in parts if re.fullmatch(r"r[nzmp]i?|rna", p)), "")
        packed = to in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2")
        supported = ("", "rn") if packed else ("", "rn", "rz") if to in ("bf16", "f16") else (rounding,)
        if rounding not in supported or "relu" in parts:
            raise UnsupportedError("rounding")
        one = Encoded(f"cvt.{to}.{source}")
        one.modifier = {"": 0, "n": 0, "z": 1, "m": 2, "p": 3}[rounding[1:2]]
        one.modifier |= (16 if "sat" in parts else 0) | (32 if "ftz" in parts else 0)
        one.vector = int(rounding.endswith("i"))
        destination, *sources = instruction.operands
        self.place_all(one, [destination, *sources], [to] + [source] * len(sources), exact=packed)
        return one

    def _ld(self, instruction: Instruction, parts: list[str]) -> Encoded:
        values, address = instruction.operands
        one = self._access("ld", parts)
        for value in _items(values):
            self.place(one, value, parts[-1], exact=False)
        self.place_address(one, address)
        if one.space == SPACES["param"]:
            one.handler = "ld.param"
        return self._checked_vector(one, values)

    def _st(self, instruction: Instruction, parts: list[str]) -> Encoded:
        address, values = instruction.operands
        one = self._access("st", parts)
        self.place_address(one, address)
        for value in _items(values):
            self.place(one, value, parts[-1], exact=False)
        return self._checked_vector(one, values)

    @staticmethod
    def _access(handler: str, parts: list[str]) -> Encoded:
        space = next((p.split("::")[0] for p in parts[1:] if p.split("::")[0] in SPACES), "")
        one = Encoded(handler, space=SPACES.get(space, GENERIC), size=size_of(parts[-1]))
        one.vector = _number_after("v", parts, default=1)
        one.is_signed = parts[-1][0] == "s"
        return one

    @staticmethod
    def _checked_vector(one: Encoded, values: Operand) -> Encoded:
        if len(_items(values)) != one.vector:
            raise UnsupportedError("vector")
        return one

    def _cp(self, instruction: Instruction, parts: list[str]) -> Encoded:
        if parts[1:3] in (["async", "commit_group"], ["async", "wait_all"]):
            return Encoded(".".join(parts))
        if parts[1:3] == ["async", "wait_group"]:
            return Encoded("cp.async.wait_group", immediate=_integer(instruction.operands[0]))
        if parts[1] != "async" or "bulk" in parts:
            raise UnsupportedError("bulk copies")
        to, source, size, *wanted = instruction.operands
        one = Encoded("cp.async", space=SPACES["shared"], size=_integer(size))
        offsets = []
        for address, width in ((to, 4), (source, 8)):
            self.place_address(one, address)
            offsets.append(one.immediate)
            if one.widths[-1] != width:
                if width == 8 or not isinstance(address, Address) or isinstance(address.base, Register):
                    raise UnsupportedError("address width")
                one.operands[-1], one.widths[-1] = self.layout.constant(0, 4), 4
        one.immediate = (offsets[1] << 32) | (offsets[0] & 0xFFFFFFFF)
        for operand in wanted:
            self.place(one, operand, "u32")
        return one

    def _ldmatrix(self, instruction: Instruction, parts: list[str]) -> Encoded:
        one = self._matrices("ldmatrix", parts)
        to, address = instruction.operands
        self.place_all(one, _items(to), ["b32"] * one.vector)
        self.place_address(one, address)
        return one

    def _stmatrix(self, instruction: Instruction, parts: list[str]) -> Encoded:
        one = self._matrices("stmatrix", parts)
        address, source = instruction.operands
        self.place_address(one, address)
        self.place_all(one, _items(source), ["b32"] * one.vector)
        return one

    @staticmethod
    def _matrices(handler: str, parts: list[str]) -> Encoded:
        if "m8n8" not in parts:
            raise UnsupportedError("shape")
        modifier = int("trans" in parts)
        return Encoded(handler, space=SPACES["shared"], size=16, vector=_number_after("x", parts), modifier=modifier)

    def _atom(self, instruction: Instruction, parts: list[str]) -> Encoded:
        space = next((p for p in parts if p in SPACES), "")
        kept = [p for p in parts[1:] if p not in SPACES]
        one = Encoded(".".join(["atom", *kept]), space=SPACES.get(space, GENERIC), vector=int(parts[0] == "atom"))
        operands = list(instruction.operands)
        if parts[0] == "atom":
            self.place(one, operands.pop(0), kept[-1])
        self.place_address(one, operands.pop(0))
        for operand in operands:
            self.place(one, operand, kept[-1])
        return one

    _red = _atom

    def _shfl(self, instruction: Instruction, parts: list[str]) -> Encoded:
        one = Encoded("shfl", vector=1, modifier=["up", "down", "bfly", "idx"].index(parts[2]))
        first, *rest = instruction.operands
        if isinstance(first, Pair):
            self.place_all(one, [first.first, first.second], ["b32", "pred"])
            one.vector = 2
        else:
            self.place(one, first, "b32")
        self.place_all(one, rest, ["b32"] * 4)
        return one

    def _vote(self, instruction: Instruction, parts: list[str]) -> Encoded:
        one = Encoded("vote", modifier=["ballot", "any", "all", "uni"].index(parts[2]))
        self.place_all(one, instruction.operands, ["b32" if parts[2] == "ballot" else "pred", "pred", "b32"])
        return one

    def _redux(self, instruction: Instruction, parts: list[str]) -> Encoded:
        one = Encoded(".".join(parts))
        self.place_all(one, instruction.operands, [parts[-1], parts[-1], "b32"])
        return one

    def _elect(self, instruction: Instruction, parts: list[str]) -> Encoded:
        one = Encoded("elect.sync")
        first, mask = instruction.operands
        assert isinstance(first, Pair)
        self.place_all(one, [first.first, first.second, mask], ["b32", "pred", "b32"])
        return one

    def _mma(self, instruction: Instruction, parts: list[str]) -> Encoded:
        """mma.sync.m16n8k16.row.col.f32.bf16.bf16.f32 and its like."""
        if parts[3:5] != ["row", "col"]:
            raise UnsupportedError("layout")
        one = Encoded(".".join(["mma", parts[2], *parts[5:]]))
        for operand, type_ in zip(instruction.operands, ("f32", "b32", "b32", "f32"), strict=True):
            self.place_all(one, _items(operand), [type_] * len(_items(operand)))
        return one

    def _wgmma(self, instruction: Instruction, parts: list[str]) -> Encoded:
        """wgmma.mma_async.sync.m64n16k16.f32.bf16.bf16 d, a, b, whether to add, signs of a and b, transpositions."""
        if parts[1] != "mma_async":
            return Encoded("nothing")
        to, a, b, adds, *flags = instruction.operands
        shape = re.fullmatch(r"m64n(\d+)k\d+", parts[3])
        if shape is None or any(_integer(sign) != 1 for sign in flags[:2]):
            raise UnsupportedError("shape or negated matrices")
        one = Encoded(".".join(["wgmma", *parts[4:]]), space=SPACES["shared"], vector=int(shape[1]) // 8)
        self.place_all(one, _items(to), ["f32"] * len(_items(to)))
        transposed = [_integer(flag) for flag in flags[2:]]
        if isinstance(a, Vector):
            self.place_all(one, _items(a), ["b32"] * 4)
            transposed = [0, *transposed]
        else:
            self.place(one, a, "b64")
            one.modifier |= 1
        self.place_all(one, [b, adds], ["b64", "pred"])
        for bit, flag in zip((2, 4), transposed, strict=False):
            one.modifier |= bit * flag
        return one

    def _bar(self, instruction: Instruction, parts: list[str]) -> Encoded:
        if parts[1] == "warp":
            one = Encoded("bar.warp.sync")
            self.place_all(one, instruction.operands, ["b32"])
            return one
        if parts[1] != "sync":
            raise UnsupportedError("barrier")
        number, *count = map(_integer, instruction.operands)
        x, y, z = self.layout.threads
        if count and count != [x * y * z]:
            raise UnsupportedError("a barrier of some threads")
        return Encoded("nothing", flow=BARRIER, immediate=number)

    _barrier = _bar

    def _nothing(self, instruction: Instruction, parts: list[str]) -> Encoded:
        return Encoded("nothing")

    _membar = _fence = _griddepcontrol = _prefetch = _nanosleep = _nothing

    def _bra(self, instruction: Instruction, parts: list[str]) -> Encoded:
        return Encoded("nothing", flow=BRANCH)

    def _ret(self, instruction: Instruction, parts: list[str]) -> Encoded:
        return Encoded("nothing", flow=EXIT)

    _exit = _trap = _ret
