"""The executor in C++ (`native/`): built when it is first needed, and the structures that it shares with Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
# Nothing may be fused or reassociated: the results are the GPU's, bit for bit, where its arithmetic is specified.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
    "-Wall", "-Wextra",
)  # fmt: skip


class Instruction(ctypes.Structure):
    """machine.h's `Instruction`."""

    _fields_ = (
        ("handler", ctypes.c_void_p), ("operand", ctypes.c_void_p), ("width", ctypes.c_void_p),
        ("immediate", ctypes.c_int64), ("target", ctypes.c_int32), ("reconverge", ctypes.c_int32),
        ("guard", ctypes.c_uint32), ("guard_negated", ctypes.c_uint8), ("flow", ctypes.c_uint8),
        ("space", ctypes.c_uint8), ("size", ctypes.c_uint8), ("vector", ctypes.c_uint8),
        ("is_signed", ctypes.c_uint8), ("operands", ctypes.c_uint8), ("modifier", ctypes.c_uint8),
    )  # fmt: skip


class Stat(ctypes.Structure):
    """What one instruction did in a launch: `executed` counts warps, `sectors` have 32 bytes, `lines` 128."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("executed", "lanes", "bytes", "sectors", "lines", "wavefronts", "ideal_wavefronts")
    )


class Allocation(ctypes.Structure):
    """machine.h's `Allocation`."""

    _fields_ = (
        ("base", ctypes.c_uint64), ("size", ctypes.c_uint64), ("read", ctypes.c_void_p), ("written", ctypes.c_void_p),
    )  # fmt: skip


class Finding(ctypes.Structure):
    """machine.h's `Finding`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("fault", "instruction", "block", "warp", "lane", "other")),
        ("address", ctypes.c_uint64), ("count", ctypes.c_uint64),
    )  # fmt: skip


class Launch(ctypes.Structure):
    """machine.h's `Launch`."""

    _fields_ = (
        ("program", ctypes.c_void_p), ("stats", ctypes.c_void_p), ("constants", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p), ("allocations", ctypes.c_void_p), ("findings", ctypes.c_void_p),
        ("registers_size", ctypes.c_uint64), ("constants_at", ctypes.c_uint64), ("constants_size", ctypes.c_uint64),
        ("shared_size", ctypes.c_uint64), ("local_size", ctypes.c_uint64), ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3), ("special", ctypes.c_uint32 * 15), ("allocation_count", ctypes.c_int32),
        ("instruction_count", ctypes.c_int32), ("finding_count", ctypes.c_int32), ("finding_limit", ctypes.c_int32),
        ("check_every", ctypes.c_int32), ("warp_order", ctypes.c_int32), ("blocks_backward", ctypes.c_int32),
        ("block_count", ctypes.c_int32), ("block_step", ctypes.c_int32), ("stopped", ctypes.c_int32),
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The executor, compiled once for each content of its sources.

    Raises:
        FileNotFoundError: there is no g++.
        subprocess.CalledProcessError: it does not compile.
    """
    built = _cache() / f"executor-{_digest(*sorted(SOURCES.iterdir()))}.so"
    if not built.exists():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(_object, sorted(SOURCES.glob("*.cpp"))))
        _run_into(built, "g++", "-shared", *map(str, objects))
    loaded = ctypes.CDLL(str(built))
    loaded.ptxrun_handler.restype = ctypes.c_void_p
    loaded.ptxrun_handler.argtypes = (ctypes.c_char_p,)
    loaded.ptxrun_launch.restype = None
    loaded.ptxrun_launch.argtypes = (ctypes.c_void_p,)
    return loaded


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vllm-deepseek-v4flash" / "ptxrun"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(*files: Path) -> str:
    content = b"".join(file.read_bytes() for file in files) + " ".join(FLAGS).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _object(source: Path) -> Path:
    """The compiled source; depends on it and the headers alone."""
    target = _cache() / f"{source.stem}-{_digest(source, *sorted(SOURCES.glob('*.h')))}.o"
    if not target.exists():
        _run_into(target, "g++", *FLAGS, "-c", str(source))
    return target


def _run_into(target: Path, *command: str) -> None:
    """Run a compiler; processes that do so at the same time do not see each other's unfinished files."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    subprocess.run([*command, "-o", str(part)], check=True)
    os.replace(part, target)
