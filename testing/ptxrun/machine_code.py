"""What ptxas makes of a kernel: registers, shared memory, and how many machine instructions (SASS) a launch issues.

PTX and SASS share source lines. A line's SASS instructions are counted as often as its PTX instructions ran on average,
which is exact where all of a line is in one loop, as nearly all of these kernels' lines are, and too much where ptxas
unrolls a loop. Counts are estimates of this kind.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton

from .executable import Result

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ASSEMBLERS = (str(TOOLS / "ptxas"), "ptxas", str(TOOLS / "ptxas-blackwell"))
"""Triton's own and the toolkit's read different versions of PTX."""
Line = tuple[str, int]
"""A file's name and a line of it."""

_MNEMONICS = {
    "mma": "HMMA HGMMA QGMMA IMMA WARPGROUP",
    "fma": "FFMA FADD FMUL HFMA2 HADD2 HMUL2 IMAD DFMA DADD DMUL",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "global": "LDG STG LDGSTS ATOMG RED ATOM LD ST",
    "shared": "LDS STS LDSM STSM ATOMS",
    "shuffle": "SHFL VOTE REDUX MATCH",
    "control": (
        "BRA BAR EXIT BSSY BSYNC WARPSYNC NOP RET CALL DEPBAR LDGDEPBAR BRX MEMBAR ERRBAR CCTL YIELD BREAK FENCE SYNCS "
        "BPT LDC ULDC LDCU S2R S2UR CS2R"
    ),
}
_UNITS = {mnemonic: unit for unit, names in _MNEMONICS.items() for mnemonic in names.split()}


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one architecture."""

    registers: int
    """Per thread."""
    shared: int
    """Bytes of shared memory that the kernel declares; what a launch asks for comes on top."""
    lines: Mapping[Line, Mapping[str, int]]
    """Instructions by source line and by the unit that executes them."""

    @property
    def instructions(self) -> int:
        return sum(sum(units.values()) for units in self.lines.values())


def unit_of(mnemonic: str) -> str:
    """The unit that executes an instruction: `alu` for what no other does, `uniform` for once per warp."""
    name = mnemonic.split(".")[0]
    if name in _UNITS:
        return _UNITS[name]
    return "uniform" if (name.startswith("U") or name == "R2UR") else "alu"


@functools.cache
def assemble(ptx: str, kernel: str) -> MachineCode:
    """Compile PTX for its `.target`, and count the instructions of one of its kernels.

    Raises:
        RuntimeError: no assembler accepts the PTX.
    """
    listing, log = _listing(ptx)
    usage = re.search(
        rf"Function properties for {re.escape(kernel)}\n.*\n.*Used (\d+) registers(?:.*?(\d+) bytes smem)?", log
    )
    if usage is None:
        raise RuntimeError(f"ptxas reports no registers of {kernel}: {log!r}")
    return MachineCode(int(usage[1]), int(usage[2] or 0), _count(listing, kernel))


@functools.cache
def _listing(ptx: str) -> tuple[str, str]:
    """The disassembled machine code with source lines, and ptxas's report."""
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        for assembler in ASSEMBLERS:
            command = [assembler, "-v", "-lineinfo", f"--gpu-name={target[1]}", str(source), "-o", str(cubin)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
            errors.append(done.stderr)
        else:
            raise RuntimeError("\n".join(errors))
        disassembled = subprocess.run(
            [str(TOOLS / "nvdisasm"), "-g", "-c", str(cubin)], check=True, capture_output=True, text=True
        )
    return disassembled.stdout, done.stderr + done.stdout


def _count(listing: str, kernel: str) -> dict[Line, dict[str, int]]:
    counts: dict[Line, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    inside, line, fresh = False, ("?", 0), True
    for text in listing.splitlines():
        if text.startswith(".text."):
            inside = text.rstrip(":") == f".text.{kernel}"
        elif not inside:
            continue
        elif found := re.match(r'\s*//## File "([^"]*)", line (\d+)', text):
            if fresh:  # of inlined calls, the innermost comes first
                line = (Path(found[1]).name, int(found[2]))
            fresh = False
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text):
            counts[line][unit_of(found[1])] += 1
            fresh = True
    return counts


def issued(result: Result, ptx: str) -> dict[str, float]:
    """Machine instructions that the warps of the blocks that ran issued, by unit; estimated as this file says."""
    kernel = result.program.kernel
    ran: dict[Line, list[int]] = defaultdict(lambda: [0, 0])
    for instruction, stat in zip(kernel.instructions, result.stats, strict=True):
        if instruction.opcode.startswith("mov") or ".param" in instruction.opcode:
            continue  # ptxas drops nearly all of these
        file, number = instruction.source or ("?", 0)
        executed = ran[Path(file).name, number]
        executed[0] += stat.executed
        executed[1] += 1
    once = result.blocks * result.warps
    total: dict[str, float] = defaultdict(float)
    for line, units in assemble(ptx, kernel.name).lines.items():
        times, instructions = ran.get(line, (once, 1))
        for unit, count in units.items():
            total[unit] += count * times / max(instructions, 1)
    return dict(total)
