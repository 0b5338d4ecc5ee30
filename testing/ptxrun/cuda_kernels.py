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
from vllm_deepseek_v4flash.ops.cuda.library import Buffers, Routing, Weights

from .executable import Executable, Memory, Schedule
from .gpus import GPUS
from .parse import parse
from .triton_kernels import MULTIPROCESSORS, Compiled, Run, launch

SOURCE = Path(__file__).parents[2] / "csrc" / "experts.cu"
THREADS, PREPARE_THREADS = 128, 256
REGISTERS = 168  # of a thread, at most: csrc/product.cuh's kBlocks
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
def _executables(arch: int, source: Path) -> dict[tuple[str, int | None], Executable]:
    """By the kernel's name and format."""
    found: dict[tuple[str, int | None], Executable] = {}
    for name, kernel in parse(ptx(arch, source)).items():
        named = re.search(r"\d+(gate_up|down)ILi(\d)E|\d+(prepare)E", name)
        assert named is not None, name
        threads = PREPARE_THREADS if named[3] else THREADS
        found[named[1] or named[3], int(named[2]) if named[2] else None] = Executable(kernel, (threads, 1, 1))
    return found


def shared_bytes(folder: Path, structure: str) -> int:
    """The size of a kernel's dynamic shared memory, `structure`, which the sources in `folder` assert.

    Raises:
        RuntimeError: they do not.
    """
    for path in sorted(folder.glob("*.cu*")):
        stated = re.search(rf"static_assert\(sizeof\({structure}\) == (\d+)\)", path.read_text())
        if stated is not None:
            return int(stated[1])
    raise RuntimeError(f"{folder} does not assert the size of {structure}")


def _resident(arch: int, shared: int) -> int:
    """Blocks of the products that a GPU holds."""
    gpu = next(gpu for gpu in GPUS.values() if gpu.arch == arch)  # blocks do not depend on which one
    return MULTIPROCESSORS[arch] * gpu.blocks_per_multiprocessor(THREADS // 32, REGISTERS, shared)


def _pack(executable: Executable, values: list[bytes]) -> bytes:
    """The values as the kernel's parameters are laid out."""
    data = bytearray()
    kernel = executable.program.kernel
    offsets = kernel.parameter_offsets().values()
    for value, parameter, offset in zip(values, kernel.parameters, offsets, strict=True):
        assert len(value) == parameter.size, parameter.name
        data += b"\0" * (offset - len(data)) + value
    return bytes(data)


class _Library:
    """Stands in for the compiled library: launches what its C function launches."""

    def __init__(self, arch: int, source: Path, launch: Launcher) -> None:
        self.arch, self.source, self.launch = arch, source, launch
        self.shared = {name: shared_bytes(source.parent, name) for name in ("Shared", "PrepareShared")}

    def deepseek_v4flash_experts(
        self, format13: int, format2: int, w13: Any, w2: Any, routing: Any, buffers: Any, limit: float, stream: Any
    ) -> int:
        """csrc/experts.cu's function of this name; pointers to structures are ctypes'."""
        up: Weights = w13.contents
        down: Weights = w2.contents
        routed: Routing = routing._obj
        to: Buffers = buffers._obj
        pairs, inner, hidden = routed.tokens * routed.topk, to.inner, to.hidden
        *starts, size = op.layout(routed.tokens, routed.topk, hidden, inner)
        names = ("plan", "rows", "activation", "halves", "products")
        memory = [
            Memory(routed.ids, 8 * pairs, "ids"), Memory(routed.weights, 4 * pairs, "router weights"),
            Memory(to.x, 2 * routed.tokens * hidden, "x"), Memory(to.out, 4 * routed.tokens * hidden, "out"),
            Memory(to.arrived, 4 * op.counters(hidden, inner, routed.topk), "arrived"),
            *(
                Memory(getattr(to, name), end - start, name)
                for name, start, end in zip(names, starts, [*starts[1:], size], strict=True)
            ),
            *_weight_memory("w13", up, routed.experts), *_weight_memory("w2", down, routed.experts),
        ]  # fmt: skip
        weights, given = [bytes(up), bytes(down)], [bytes(routed), bytes(to)]
        shared, most = self.shared["Shared"], _resident(self.arch, self.shared["Shared"])

        def blocks(w: Weights, tiles: int) -> int:
            return min(most, -(-(-(-w.columns // w.segment) * tiles * pairs) // (THREADS // 32)))

        launches: list[tuple[str, int | None, int, int, list[bytes]]] = [
            ("prepare", None, routed.tokens + 2, self.shared["PrepareShared"], given),
            ("gate_up", format13, blocks(up, inner // 16), shared, [weights[0], *given, bytes(ctypes.c_float(limit))]),
            ("down", format2, blocks(down, hidden // 32), shared, [weights[1], *given]),
        ]
        for name, number, count, bytes_, values in launches:
            executable = _executables(self.arch, self.source)[name, number]
            compiled = Compiled(executable, ptx(self.arch, self.source), bytes_)
            self.launch(name, compiled, _pack(executable, values), memory, (count, 1, 1))
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
