"""The compiled kernels of `csrc/`, loaded through their C interface: no PyTorch headers, so any PyTorch will do."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

LIBRARY = Path(__file__).with_name("kernels.so")
ABI = 2  # csrc's kAbi: both change when an argument does


class Weights(ctypes.Structure):
    """`Weights` of csrc/weights.cuh."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("scale_type", ctypes.c_int),
        ("group", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("segment", ctypes.c_int),
    )


class Routing(ctypes.Structure):
    """`Routing` of csrc/plan.cuh."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("topk", ctypes.c_int),
        ("first", ctypes.c_int),
        ("experts", ctypes.c_int),
    )


class Buffers(ctypes.Structure):
    """`Buffers` of csrc/plan.cuh."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "plan", "rows", "activation", "halves", "products", "arrived", "out")
        ),
        *((name, ctypes.c_int) for name in ("hidden", "inner", "narrow13", "narrow2")),
    )


def built() -> bool:
    """Whether the installation compiled the kernels."""
    return LIBRARY.is_file()


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        RuntimeError: they were compiled from other sources than this package's.
    """
    return load(LIBRARY)


def load(path: Path) -> ctypes.CDLL:
    """The kernels in one file, their functions declared."""
    handle = ctypes.CDLL(str(path))
    abi = handle.deepseek_v4flash_abi()
    if abi != ABI:
        raise RuntimeError(
            f"{path} was compiled from other sources (interface {abi}, this package has {ABI}): install the package "
            f"again, which compiles it"
        )
    by_reference = ctypes.POINTER
    handle.deepseek_v4flash_experts.argtypes = (
        ctypes.c_int, ctypes.c_int, by_reference(Weights), by_reference(Weights), by_reference(Routing),
        by_reference(Buffers), ctypes.c_float, ctypes.c_void_p,
    )  # fmt: skip
    return handle


@functools.cache
def failure() -> str | None:
    """Why the compiled kernels cannot run on this process's GPU; None where they can. Starts CUDA."""
    try:
        status = library().deepseek_v4flash_probe()
    except (OSError, RuntimeError) as error:
        return str(error)
    return (
        None if status == 0 else f"cudaError {status}: not compiled for this GPU, or by a newer CUDA than the driver's"
    )
