"""Small kernels around one instruction, run on NumPy arrays, and values to run them on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .executable import Executable, Fault, Memory, Result, Schedule
from .parse import parse, size_of

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"
Array = np.ndarray[Any, Any]


def launch(
    body: str, arrays: list[Array], *, threads: int = 32, grid: int = 1, shared: int = 0,
    schedule: Schedule | None = None,
) -> Result:  # fmt: skip
    """Run `body`, in which %p0, %p1... are the arrays' addresses, %t is the thread's number and `memory` shared."""
    (kernel,) = parse(ptx(body, len(arrays), threads)).values()
    data = b"".join(a.ctypes.data.to_bytes(8, "little") for a in arrays)
    memory = [Memory(a.ctypes.data, a.nbytes) for a in arrays]
    return Executable(kernel, (threads, 1, 1)).launch((grid, 1, 1), data, shared, memory, schedule)


def ptx(body: str, arrays: int, threads: int) -> str:
    """The kernel `k` that `launch` runs."""
    parameters = ", ".join(f".param .u64 a{i}" for i in range(arrays))
    loads = "".join(f"ld.param.u64 %p{i}, [a{i}];\n" for i in range(arrays))
    return (
        f"{HEAD}.visible .entry k({parameters}) .reqntid {threads}\n{{\n.reg .b64 %p<{arrays + 1}>;\n"
        f".reg .b32 %t;\nmov.u32 %t, %tid.x;\n{loads}{body}\nret;\n}}\n"
    )


def faults(result: Result) -> set[Fault]:
    return {finding.fault for finding in result.findings}


def lanewise(opcode: str, to: str, types: list[str], inputs: list[Array], dtype: Any, extra: str = "") -> Array:
    """The instruction on every element; predicates are arrays of bool, a predicate result becomes 0 or 1."""
    count = len(inputs[0])
    body, names, arrays = "", [], []
    for i, (type_, values) in enumerate(zip(types, inputs, strict=True)):
        held = np.ascontiguousarray(values.astype(np.uint8) if type_ == "pred" else values)
        arrays.append(held)
        bits = 8 * held.itemsize
        body += f".reg .b{max(bits, 16)} %x{i};\n.reg .b64 %q{i};\nmad.wide.u32 %q{i}, %t, {held.itemsize}, %p{i};\n"
        body += f"ld.global.{'u8' if bits == 8 else f'b{bits}'} %x{i}, [%q{i}];\n"
        if type_ == "pred":
            body += f".reg .pred %y{i};\nsetp.ne.b16 %y{i}, %x{i}, 0;\n"
        names.append(f"%y{i}" if type_ == "pred" else f"%x{i}")
    out = np.zeros(count, dtype)
    arrays.append(out)
    bits = 32 if to == "pred" else 8 * size_of(to)
    body += f".reg .b{max(bits, 16)} %d;\n.reg .pred %dp;\n.reg .b64 %q;\n"
    body += f"{opcode} {'%dp' if to == 'pred' else '%d'}, {', '.join(names)}{extra};\n"
    if to == "pred":
        body += "selp.b32 %d, 1, 0, %dp;\n"
    body += f"mad.wide.u32 %q, %t, {out.itemsize}, %p{len(arrays) - 1};\nst.global.b{8 * out.itemsize} [%q], %d;\n"
    result = launch(body, arrays, threads=count)
    assert not result.findings, result.findings
    return out


def integers(rng: np.random.Generator, type_: str, count: int = 64) -> Array:
    """Values of a PTX integer type, its extremes among them."""
    bits = int(type_[1:])
    dtype = np.dtype(f"{'i' if type_[0] == 's' else 'u'}{bits // 8}")
    values = rng.integers(0, 2**bits, count, dtype=np.uint64).astype(f"u{bits // 8}").view(dtype)
    info = np.iinfo(dtype)
    values[:6] = [0, 1, info.max, info.min, 7, 3]
    return values


def wrapped(values: Iterable[int], type_: str) -> Array:
    """Python's integers modulo the type's range, as unsigned ones."""
    bits = int(type_[1:])
    return np.array([int(v) & ((1 << bits) - 1) for v in values], np.uint64).astype(f"u{bits // 8}")


def dtype_of(type_: str) -> np.dtype[Any]:
    return np.dtype(f"{'i' if type_[0] == 's' else 'u'}{int(type_[1:]) // 8}")


def floats(rng: np.random.Generator, count: int = 64) -> Array:
    """fp32 of all magnitudes, special values among them."""
    values = (rng.standard_normal(count) * 10.0 ** rng.integers(-20, 20, count)).astype(np.float32)
    values[:10] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.5, 3e-42, 3.4e38, 65504]
    return values
