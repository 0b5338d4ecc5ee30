"""How every kernel is started, and what its wrapper may know about the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton


@dataclass(frozen=True)
class Device:
    """What a wrapper may choose by."""

    multiprocessors: int
    """How many programs run at the same time, at least."""
    native_fp8: bool
    """Whether the device has instructions that convert e4m3 (SM89 and newer); older ones use bit arithmetic."""
    shared_kb: int
    """Of shared memory in a multiprocessor, for all its programs."""


Pointer = Any
"""A member of a struct that is a tensor to the wrapper and a pointer to the kernel."""


class Strided(NamedTuple):
    """Rows of a matrix [N, D], each contiguous."""

    data: Pointer
    stride: int
    """Elements from one row to the next."""


Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]

_recorder: Recorder | None = None
_recorded_device: Device | None = None


def device_of(tensor: torch.Tensor) -> Device:
    """The traits of the device that holds `tensor`; the interpreter's are those of a very small GPU."""
    if _recorded_device is not None:
        return _recorded_device
    return _device(tensor.device) if tensor.is_cuda else Device(4, native_fp8=False, shared_kb=100)


@functools.cache
def _device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    native_fp8 = (properties.major, properties.minor) >= (8, 9)
    return Device(properties.multi_processor_count, native_fp8, properties.shared_memory_per_multiprocessor // 1024)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` on `grid` programs; nothing runs if a dimension of the grid is zero."""
    options.setdefault("enable_fp_fusion", True)  # Triton 3.10 changes its default
    if _recorder is not None:
        _recorder(kernel, grid, args, options)
    elif all(grid):
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recorded(device: Device, recorder: Recorder) -> Iterator[None]:
    """Hand every launch to `recorder` instead of running it, as if on `device`: for ahead-of-time compilation.

    Tensors may then be on the `meta` device.
    """
    global _recorder, _recorded_device
    _recorder, _recorded_device = recorder, device
    try:
        yield
    finally:
        _recorder = _recorded_device = None


def strided(x: torch.Tensor) -> Strided:
    """A matrix [N, D] for a kernel; copied unless its rows are contiguous."""
    x = x if x.stride(1) == 1 else x.contiguous()
    return Strided(x, x.stride(0))


def block(size: int, smallest: int = 1) -> int:
    """The power of two that a tile needs to hold `size` elements."""
    return max(smallest, triton.next_power_of_2(size))
