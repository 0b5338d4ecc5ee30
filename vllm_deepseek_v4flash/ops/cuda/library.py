"""The compiled kernels of `csrc/`, loaded through their C interface: no PyTorch headers, so any PyTorch will do."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

LIBRARY = Path(__file__).with_name("kernels.so")
ABI = 1  # csrc's kAbi: both change when an argument does


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
    )


class Routing(ctypes.Structure):
    """`Routing` of csrc/experts.cu."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("topk", ctypes.c_int),
        ("first", ctypes.c_int),
        ("experts", ctypes.c_int),
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
    pointer, by_reference = ctypes.c_void_p, ctypes.POINTER
    handle.deepseek_v4flash_experts.argtypes = (
        ctypes.c_int, by_reference(Weights), by_reference(Weights), by_reference(Routing),
        pointer, pointer, pointer, pointer, pointer, ctypes.c_float, pointer,
    )  # fmt: skip
    return handle
