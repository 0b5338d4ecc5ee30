"""What the kernels of csrc/ need on each GPU, from nvcc and from the cubins: lines for the compile table."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from testing.ptxrun.cuda_kernels import shared_bytes

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = tuple(sorted(CSRC.glob("*.cu")))
FORMATS = ("int4", "int4 zeros", "int4 narrow", "int4 narrow zeros", "fp4")  # csrc/weights.cuh's, by their numbers
STRUCTURES = {"prepare": "PrepareShared"}  # of dynamic shared memory, where it is not Shared


@dataclass(frozen=True)
class Compiled:
    """One kernel of one source on one architecture."""

    source: str
    function: str
    weight: str
    """Its format, or "any"."""
    registers: int
    shared: int
    spilled: int


def nvcc() -> str | None:
    """The compiler, where there is one."""
    return shutil.which("nvcc")


def compile_all(archs: list[int]) -> dict[int, list[Compiled] | str]:
    """Every kernel for each architecture that nvcc knows, or what nvcc said instead."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(archs, pool.map(_compile, archs), strict=True))


def _compile(arch: int) -> list[Compiled] | str:
    found: list[Compiled] = []
    for source in SOURCES:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            command = [str(nvcc()), "-std=c++17", "-O3", f"-arch=sm_{arch}", "--cubin", "-Xptxas=-v", "-o", cubin.name]
            result = subprocess.run([*command, str(source)], capture_output=True, text=True)
            if result.returncode:
                return f"{source.name} does not compile: {' '.join(result.stderr.split())}"
            found += _read(source.stem, result.stderr)
    return found


def _read(source: str, listing: str) -> Iterator[Compiled]:
    """ptxas's report: for each kernel its name, then its spills, then its registers."""
    entries = re.split(r"Compiling entry function '", listing)[1:]
    for entry in entries:
        mangled = re.match(r"\w+", entry)
        name = re.search(r"\d+(gate_up|down|prepare)(?:ILi(\d+))?E", mangled[0] if mangled else "")
        registers = re.search(r"Used (\d+) registers", entry)
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", entry)
        if name is None or registers is None or spills is None:
            raise RuntimeError(f"ptxas reported something else than expected: {entry!r}")
        shared = shared_bytes(CSRC, STRUCTURES.get(name[1], "Shared"))
        weight = FORMATS[int(name[2])] if name[2] else "any"
        yield Compiled(source, name[1], weight, int(registers[1]), shared, int(spills[1]) + int(spills[2]))
