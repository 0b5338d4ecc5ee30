"""PTX text to kernels: parameters, declared arrays, registers, and instructions with their operands."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

_PACKED_SIZES = {"pred": 1, "f16x2": 4, "bf16x2": 4, "f16": 2, "bf16": 2, "tf32": 4, "e4m3x2": 2, "e5m2x2": 2}


def size_of(type_: str) -> int:
    """Bytes of one value of a PTX type; a predicate counts as one."""
    return _PACKED_SIZES.get(type_) or int(re.sub(r"\D", "", type_)) // 8


@dataclass(frozen=True)
class Register:
    """`%r1`, or `!%p1` where negated."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A constant, as written."""

    text: str

    def bits(self, type_: str) -> int:
        """The constant's bit pattern as a value of `type_`."""
        size, text = size_of(type_), self.text
        if text[:2] in ("0f", "0F"):
            raw = int(text[2:], 16)
            if type_ != "f64":
                return raw
            return struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", raw))[0]))[0]
        if text[:2] in ("0d", "0D"):
            return int(text[2:], 16)
        if re.fullmatch(r"-?\d*\.\d*(e[-+]?\d+)?", text):
            code = {2: "e", 4: "f", 8: "d"}[size]
            return int.from_bytes(struct.pack("<" + code, float(text)), "little")
        return int(text.rstrip("Uu"), 0) & ((1 << (8 * size)) - 1)


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a declared array, plus an offset in bytes."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True)
class Pair:
    """Two destinations, `d|p`."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """`_`, a destination that is not read."""


Operand = Register | Immediate | Symbol | Vector | Address | Pair | Sink
SourceLine = tuple[str, int]
"""A file and a line of the source that was compiled."""


@dataclass
class Instruction:
    opcode: str
    operands: list[Operand]
    guard: Register | None
    text: str
    line: int
    """Of the PTX, from 1."""
    source: SourceLine | None = None
    """Where the compiler says it comes from."""


@dataclass
class Array:
    """Memory that a kernel declares, or one of its parameters."""

    space: str
    name: str
    align: int
    size: int
    """Bytes; 0 for dynamic shared memory."""
    initial: bytes = b""


@dataclass
class Kernel:
    name: str
    parameters: list[Array]
    registers: dict[str, str] = field(default_factory=dict)
    """Types by name; a register of an inner scope has the scope's number in its name."""
    arrays: list[Array] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """The instruction that follows each label."""

    def parameter_offsets(self) -> dict[str, int]:
        """Where each parameter starts in the parameters' memory, in bytes."""
        offset, offsets = 0, {}
        for parameter in self.parameters:
            offset = -(-offset // parameter.align) * parameter.align
            offsets[parameter.name] = offset
            offset += parameter.size
        return offsets


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX module by name.

    Raises:
        ValueError: a statement is not one that compilers emit for a kernel without calls.
    """
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    files = {int(number): path for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, flags=re.M)}
    text = re.sub(r"^\.(version|target|address_size)[^\n]*", "", text, flags=re.M)
    kernels: dict[str, Kernel] = {}
    module_arrays: list[Array] = []
    at = 0
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
        module_arrays += _arrays(text[at : entry.start()].split(";"))
        end = _closing_brace(text, entry.end() - 1)
        kernel = Kernel(entry[1], _arrays(entry[2].split(",")))
        first_line = text.count("\n", 0, entry.end()) + 1
        _Body(kernel, files).parse(text[entry.end() : end], first_line)
        kernel.arrays += module_arrays
        kernels[kernel.name] = kernel
        at = end + 1
    return kernels


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for match in re.finditer(r"[{}]", text[opening:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return opening + match.start()
    raise ValueError("unbalanced braces")


_ARRAY = re.compile(
    r"^(?:\.(?:visible|extern|weak)\s+)*\.(param|shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$.]+)\s*(?:\[(\d*)\])?\s*(?:=\s*(.*))?$",
    re.S,
)


def _array(statement: str) -> Array | None:
    """The array or parameter that a statement declares, if it does."""
    found = _ARRAY.match(" ".join(statement.split()))
    if found is None:
        return None
    space, align, type_, name, count, initial = found.groups()
    element = size_of(type_)
    size = element * (int(count) if count else 0 if count == "" else 1)
    data = b""
    if initial:
        values = re.findall(r"-?\w+", initial)
        data = b"".join((int(v, 0) & ((1 << 8 * element) - 1)).to_bytes(element, "little") for v in values)
    return Array(space, name, int(align or element), size, data)


def _arrays(statements: list[str]) -> list[Array]:
    return [array for statement in statements if (array := _array(statement)) is not None]


class _Body:
    """Fills in a kernel from the text between its braces."""

    def __init__(self, kernel: Kernel, files: dict[int, str]) -> None:
        self.kernel, self.files = kernel, files
        self.source: SourceLine | None = None
        self.scopes: list[dict[str, str]] = [{}]
        """Each open scope's registers, and their names in the kernel."""
        self.prefixes = [""]
        self.scope_count = 0

    def parse(self, text: str, first_line: int) -> None:
        statement, started, depth = "", first_line, 0
        for number, line in enumerate(text.split("\n"), first_line):
            if self._is_directive(line.strip()):
                continue
            for char in line + "\n":
                if not statement.strip():
                    started = number
                    if char in "{}":
                        self._scope(opens=char == "{")
                        continue
                depth += (char == "{") - (char == "}")  # a vector's braces
                if char == ":" and depth == 0 and re.fullmatch(r"\s*[\w$]+", statement):
                    self.kernel.labels[self._named(statement.strip())] = len(self.kernel.instructions)
                    statement = ""
                elif char == ";":
                    self._statement(" ".join(statement.split()), started)
                    statement = ""
                else:
                    statement += char

    def _is_directive(self, line: str) -> bool:
        """Whether the line holds no statement; `.loc` sets the source line of those that follow."""
        words = line.split()
        if words[:1] == [".loc"]:
            self.source = (self.files.get(int(words[1]), "?"), int(words[2].rstrip(",")))
        return bool(words) and words[0] in (".loc", ".file", ".pragma")

    def _scope(self, opens: bool) -> None:
        if opens:
            self.scope_count += 1
            self.scopes.append({})
            self.prefixes.append(f"scope{self.scope_count}.")
        else:
            self.scopes.pop()
            self.prefixes.pop()

    def _named(self, name: str) -> str:
        """A register's name in the kernel, by the innermost scope that declares it."""
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _statement(self, text: str, line: int) -> None:
        if not text:
            return
        if text.startswith(".reg"):
            self._declare_registers(text)
        elif (array := _array(text)) is not None:
            self.kernel.arrays.append(array)
        elif text.startswith("."):
            raise ValueError(f"PTX line {line}: unknown directive {text!r}")
        else:
            self._instruction(text, line)

    def _declare_registers(self, text: str) -> None:
        declared = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text)
        assert declared is not None, text
        type_, names = declared.groups()
        for name in (n.strip() for n in names.split(",")):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                full = self.prefixes[-1] + each
                self.scopes[-1][each] = full
                self.kernel.registers[full] = type_

    def _instruction(self, text: str, line: int) -> None:
        guard, rest = None, text
        if text.startswith("@"):
            name, rest = text[1:].split(None, 1)
            guard = Register(self._named(name.lstrip("!")), name.startswith("!"))
        opcode = re.match(r"[\w.:]+", rest)
        assert opcode is not None, text
        operands = [self._operand(operand) for operand in _split(rest[opcode.end() :].strip())]
        self.kernel.instructions.append(Instruction(opcode[0], operands, guard, text, line, self.source))

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1])
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        name = self._named(text.lstrip("!"))
        if name in self.kernel.registers or name.startswith("%"):
            return Register(name, text.startswith("!"))
        if re.match(r"[-+]?[\d.]", text):
            return Immediate(text)
        if found := re.fullmatch(r"([\w$]+)\s*\+\s*(\d+)", text):
            return Symbol(found[1], int(found[2]))
        return Symbol(name)

    def _address(self, text: str) -> Address:
        found = re.fullmatch(r"\s*([%\w$.]+?)\s*(?:\+\s*(-?\w+)|(-\d+))?\s*", text)
        if found is None:
            raise ValueError(f"unknown form of address: {text!r}")
        offset = int(found[2] or found[3] or "0", 0)
        base = self._operand(found[1])
        if isinstance(base, Immediate):
            return Address(None, int(base.text, 0) + offset)
        assert isinstance(base, Register | Symbol), text
        return Address(base, offset)


def _split(text: str) -> list[str]:
    """The parts between commas that are not inside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts
