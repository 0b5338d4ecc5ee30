"""Fills what the package allocates without initialising, so that a value nobody wrote cannot look right by luck.

Fresh memory is mostly zeros, which is what a forgotten write should have put there. Here a floating tensor starts as
NaN, an index far out of range, and bytes as 0xFF, which is NaN in every format that the cache packs into bytes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

PACKAGE = "vllm_deepseek_v4flash"
FUNCTIONS = ("empty", "empty_like", "empty_strided")
METHODS = ("new_empty", "new_empty_strided")
POISON_BYTE = 0xFF


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite `tensor` with NaN or with the integer poison of its dtype, and return it."""
    with torch.no_grad():
        if tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool:
            tensor.view(torch.uint8).fill_(POISON_BYTE)
        elif tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(torch.nan)
        else:
            tensor.fill_(poison_integer(tensor.dtype))
    return tensor


def poison_integer(dtype: torch.dtype) -> int:
    """Wrong wherever it is used: as an index far below any tensor, and a quarter of the range so that sums of two
    do not wrap round to something plausible."""
    if dtype is torch.bool:
        return 1
    limits = torch.iinfo(dtype)
    return limits.min // 4 if limits.min else limits.max


def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, whose result is filled when a module of the package calls it."""

    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        # torch.compile cannot trace the look at the frame, and in a graph there is nothing to forget.
        if not torch.compiler.is_compiling() and _in_package(sys._getframe(1).f_globals.get("__name__", "")):
            fill(result)
        return result

    return allocate_poisoned


def _in_package(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Patch torch's allocating functions and methods until the end of the `with` block."""
    # torch lists the functions that `with torch.device(...)` applies to on first use; it must list the originals.
    with torch.device("cpu"):
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in FUNCTIONS:
            patch.setattr(torch, name, poisoning(getattr(torch, name)))
        for name in METHODS:
            patch.setattr(torch.Tensor, name, poisoning(getattr(torch.Tensor, name)))
        yield
