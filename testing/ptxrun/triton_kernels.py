"""Triton kernels on the executor: whatever an op launches is compiled for a GPU and runs on CPU tensors.

    with executed(arch=80) as runs:
        out = vllm_deepseek_v4flash.ops.triton.rms_norm.rms_norm(x, weight, 1e-6)

Triton must not interpret: TRITON_INTERPRET must be unset when the kernels are imported.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from vllm_deepseek_v4flash.ops.triton.launch import Device, recorded

from .executable import Executable, Memory, Result, Schedule
from .parse import parse

MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
SHARED_KB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}


def device(arch: int) -> Device:
    """What a wrapper may choose by on `arch`."""
    return Device(MULTIPROCESSORS[arch], native_fp8=arch >= 89, shared_kb=SHARED_KB[arch])


@dataclass(frozen=True)
class Run:
    """One launch: what ran, and what it did."""

    kernel: str
    grid: tuple[int, int, int]
    result: Result
    shared: int
    """Bytes of dynamic shared memory per block."""
    ptx: str


@dataclass(frozen=True)
class Compiled:
    """A kernel in one specialisation."""

    executable: Executable
    ptx: str
    shared: int


class Compiler:
    """Compiles launches as Triton does at run time, each specialisation once.

    Args:
        change: what runs instead of a kernel's PTX, given the kernel's name and its PTX.
    """

    def __init__(self, arch: int, change: Callable[[str, str], str] | None = None) -> None:
        self.arch, self.change = arch, change
        self.target = GPUTarget("cuda", arch, 32)
        self.backend = make_backend(self.target)
        self.compiled: dict[tuple[str, str], Compiled] = {}
        self.binder = functools.cache(lambda k: create_function_from_signature(k.signature, k.params, self.backend))

    def compile(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Compiled, list[Any]]:
        """The kernel, and those of its arguments that are not compiled in, tuples flattened."""
        source, chosen, bound = self.specialised(kernel, args, options)
        key = (source.hash(), chosen.hash())
        if key not in self.compiled:
            made = triton.compile(source, target=self.target, options=vars(chosen))
            if getattr(made.metadata, "global_scratch_size", 0):
                raise NotImplementedError(f"{kernel.fn.__name__} needs global scratch memory")
            ptx = made.asm["ptx"]
            if self.change is not None:
                ptx = self.change(kernel.fn.__name__, ptx)
            (entry,) = parse(ptx).values()
            executable = Executable(entry, (32 * made.metadata.num_warps, 1, 1))
            self.compiled[key] = Compiled(executable, ptx, made.metadata.shared)
        signature = source.signature
        given = [value for name in signature for value in _runtime_values(bound[name], signature[name])]
        return self.compiled[key], given

    def variant(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, str]:
        """The specialisation that a launch needs: where it is not yet there, Triton compiles."""
        source, chosen, _ = self.specialised(kernel, args, options)
        return source.hash(), chosen.hash()

    def specialised(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any, Any]:
        """What Triton would compile, by which options, and all arguments by name."""
        bound, specialization, rest = self.binder(kernel)(*args, **options)
        chosen, signature, constants, attributes = kernel._pack_args(self.backend, options, bound, specialization, rest)
        return ASTSource(kernel, signature, constants, attributes), chosen, bound


@functools.cache
def compiler(arch: int) -> Compiler:
    """This process's compiler for an architecture."""
    return Compiler(arch)


def _runtime_values(value: Any, type_: Any) -> list[Any]:
    """The value as the kernel takes it at run time: nothing where it is compiled in, its items where it is a tuple."""
    if isinstance(type_, tuple):
        return [item for pair in zip(value, type_, strict=True) for item in _runtime_values(*pair)]
    return [] if type_ == "constexpr" else [value]


def pack(executable: Executable, values: list[Any]) -> bytes:
    """The arguments as the kernel's parameters are laid out; those that Triton adds at the end are null."""
    kernel = executable.program.kernel
    if len(values) > len(kernel.parameters):
        raise ValueError(f"{len(values)} arguments for {len(kernel.parameters)} parameters of {kernel.name}")
    data = bytearray()
    offsets = kernel.parameter_offsets().values()
    for number, (parameter, offset) in enumerate(zip(kernel.parameters, offsets, strict=True)):
        value = values[number] if number < len(values) else 0
        if value is None:
            value = 0
        data += b"\0" * (offset - len(data))
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        if isinstance(value, float):
            data += struct.pack("<f" if parameter.size == 4 else "<d", value)
        else:
            data += (int(value) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
    return bytes(data)


def span(tensor: torch.Tensor, name: str = "") -> Memory:
    """A tensor's bytes, from its first to its last element."""
    if tensor.numel() == 0:
        return Memory(tensor.data_ptr(), 0, name)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Memory(tensor.data_ptr(), (last + 1) * tensor.element_size(), name)


def dimensions(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """A grid's x, y and z."""
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def execute(
    name: str, compiled: Compiled, given: list[Any], grid: tuple[int, int, int], schedule: Schedule | None
) -> Run:
    """Launch what `Compiler.compile` has returned."""
    return launch(name, compiled, pack(compiled.executable, given), spans(given), grid, schedule)


def spans(given: list[Any]) -> list[Memory]:
    """The memory of those arguments that are tensors, by their numbers."""
    return [span(value, str(n)) for n, value in enumerate(given) if isinstance(value, torch.Tensor)]


def launch(
    name: str, compiled: Compiled, parameters: bytes, memory: list[Memory], grid: tuple[int, int, int],
    schedule: Schedule | None,
) -> Run:  # fmt: skip
    """Run a kernel's grid on memory."""
    result = compiled.executable.launch(grid, parameters, compiled.shared, memory, schedule)
    return Run(name, grid, result, compiled.shared, compiled.ptx)


@contextlib.contextmanager
def executed(arch: int, *, instead: Compiler | None = None, schedule: Schedule | None = None) -> Iterator[list[Run]]:
    """Run every launch of a Triton kernel on the executor, as if on a GPU of `arch`; yields what ran so far.

    Args:
        instead: a compiler to use instead of this process's.
    """
    used = compiler(arch) if instead is None else instead
    runs: list[Run] = []

    def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if all(grid):
            compiled, given = used.compile(kernel, args, options)
            runs.append(execute(kernel.fn.__name__, compiled, given, dimensions(grid), schedule))

    with recorded(device(arch), run):
        yield runs
