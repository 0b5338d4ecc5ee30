"""csrc/experts.cu on the executor: nvcc's PTX in place of the library that `ops/cuda` loads.

with executed(arch=80) as runs:
    out = vllm_deepseek_v4flash.ops.cuda.packed_experts.packed_experts(...)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from vllm_deepseek_v4flash.ops.cuda import packed_experts as op
from vllm_deepseek_v4flash.ops.cuda.library import Routing, Weights

from .executable import Executable, Memory, Schedule
from .parse import parse
from .triton_kernels import Compiled, Run, launch

SOURCE = Path(__file__).parents[2] / "csrc" / "experts.cu"
THREADS = 128
UP_ROWS, DOWN_ROWS = 16, 32  # of one block
Launcher = Callable[[str, Compiled, bytes, list[Memory], tuple[int, int, int]], None]
"""Takes a kernel's name, the kernel, its parameters, the memory that it may access, and the grid."""
_SCALE_BYTES = {0: 4, 1: 2, 2: 2, 3: 1}  # csrc/weights.cuh's ScaleType


def nvcc() -> str | None:
    """The compiler, where there is one."""
    return shutil.which("nvcc")


@functools.cache
def ptx(arch: int, source: Path = SOURCE) -> str:
    """What nvcc makes of a source for an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        options = ["-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{arch}", "--ptx"]
        subprocess.run([str(nvcc()), *options, "-o", str(out), str(source)], check=True)
        return out.read_text()


@functools.cache
def _executables(arch: int, source: Path) -> dict[tuple[str, int], Executable]:
    """By the kernel's name and codec."""
    found = {}
    for name, kernel in parse(ptx(arch, source)).items():
        named = re.search(r"\d+(gate_up|down)ILi(\d)E", name)
        assert named is not None, name
        found[named[1], int(named[2])] = Executable(kernel, (THREADS, 1, 1))
    return found


def _pack(executable: Executable, values: list[bytes]) -> bytes:
    """The values as the kernel's parameters are laid out."""
    data = bytearray()
    kernel = executable.program.kernel
    offsets = kernel.parameter_offsets().values()
    for value, parameter, offset in zip(values, kernel.parameters, offsets, strict=True):
        assert len(value) == parameter.size, parameter.name
        data += b"\0" * (offset - len(data)) + value
    return bytes(data)


def _address(value: int) -> bytes:
    return value.to_bytes(8, "little")


class _Library:
    """Stands in for the compiled library: launches what its C function launches."""

    def __init__(self, arch: int, source: Path, launch: Launcher) -> None:
        self.arch, self.source, self.launch = arch, source, launch
        stated = re.search(r"static_assert\(sizeof\(Shared\) == (\d+)\)", source.read_text())
        assert stated is not None, f"{source} does not assert the size of its shared memory"
        self.shared = int(stated[1])

    def deepseek_v4flash_experts(
        self, codec: int, w13: Any, w2: Any, routing: Any, x: int, activation: int, products: int, arrived: int,
        out: int, limit: float, stream: Any,
    ) -> int:  # fmt: skip
        """csrc/experts.cu's function of this name; pointers to structures are ctypes'."""
        up: Weights = w13.contents
        down: Weights = w2.contents
        routed: Routing = routing._obj
        pairs, inner, hidden = routed.tokens * routed.topk, up.rows // 2, down.rows
        memory = [
            Memory(routed.ids, 8 * pairs, "ids"), Memory(routed.weights, 4 * pairs, "router weights"),
            Memory(x, 2 * routed.tokens * up.columns, "x"), Memory(activation, 2 * pairs * inner, "activation"),
            Memory(products, 4 * pairs * hidden, "products"),
            Memory(arrived, 4 * -(-hidden // DOWN_ROWS), "arrived"), Memory(out, 4 * routed.tokens * hidden, "out"),
            *_weight_memory("w13", up, routed.experts), *_weight_memory("w2", down, routed.experts),
        ]  # fmt: skip
        limits = bytes(ctypes.c_float(limit))
        launches = {
            "gate_up": (-(-inner // UP_ROWS), [bytes(up), bytes(routed), _address(x), _address(activation), limits]),
            "down": (
                -(-hidden // DOWN_ROWS),
                [bytes(down), bytes(routed), *map(_address, (activation, products, arrived, out))],
            ),
        }
        for name, (tiles, values) in launches.items():
            executable = _executables(self.arch, self.source)[name, codec]
            compiled = Compiled(executable, ptx(self.arch, self.source), self.shared)
            self.launch(name, compiled, _pack(executable, values), memory, (tiles, pairs, 1))
        return 0


def _weight_memory(name: str, weights: Weights, experts: int) -> list[Memory]:
    rows = experts * weights.rows
    groups = rows * (weights.columns // weights.group)
    found = [
        Memory(weights.codes, rows * weights.columns // 2, f"{name} codes"),
        Memory(weights.scales, groups * _SCALE_BYTES[weights.scale_type], f"{name} scales"),
    ]
    return found + ([Memory(weights.zeros, groups, f"{name} zeros")] if weights.zeros else [])


@contextlib.contextmanager
def launched(arch: int, launcher: Launcher, source: Path = SOURCE) -> Iterator[None]:
    """Hand what `ops/cuda` launches to `launcher`, as if on a GPU of `arch`."""
    with mock.patch.object(op, "library", return_value=_Library(arch, source, launcher)):
        yield


@contextlib.contextmanager
def executed(arch: int, *, source: Path = SOURCE, schedule: Schedule | None = None) -> Iterator[list[Run]]:
    """Run what `ops/cuda` launches on the executor; yields what ran so far."""
    runs: list[Run] = []

    def run(name: str, compiled: Compiled, parameters: bytes, memory: list[Memory], grid: tuple[int, int, int]) -> None:
        runs.append(launch(name, compiled, parameters, memory, grid, schedule))

    with launched(arch, run, source):
        yield runs
