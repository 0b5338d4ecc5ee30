"""Fills memory that the package allocates without initialising, so that a value never written cannot look right.

Fresh memory is mostly zeros, often the very values that a forgotten write should have stored. Here floats start as
NaN, integers far out of any index's range, and bytes as 0xFF, which is NaN in every format of the cache.
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
    """Overwrite `tensor` with NaN, or with the poison of its integer dtype; returns it."""
    with torch.no_grad():
        if tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool:
            tensor.view(torch.uint8).fill_(POISON_BYTE)
        elif tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(torch.nan)
        else:
            tensor.fill_(poison_integer(tensor.dtype))
    return tensor


def poison_integer(dtype: torch.dtype) -> int:
    """Wrong wherever it is used: an index far below any tensor's, and a quarter of the range, so that the sum of two
    does not wrap around to a plausible value."""
    if dtype is torch.bool:
        return 1
    limits = torch.iinfo(dtype)
    return limits.min // 4 if limits.min else limits.max


def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, whose result is filled with poison if a module of the package calls it."""

    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        # torch.compile cannot trace sys._getframe.
        if not torch.compiler.is_compiling() and _in_package(sys._getframe(1).f_globals.get("__name__", "")):
            fill(result)
        return result

    return allocate_poisoned


def _in_package(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Patch torch's allocating functions and methods until the end of the `with` block."""
    # On its first use `with torch.device(...)` lists the functions that it applies to: it must list the originals.
    with torch.device("cpu"):
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in FUNCTIONS:
            patch.setattr(torch, name, poisoning(getattr(torch, name)))
        for name in METHODS:
            patch.setattr(torch.Tensor, name, poisoning(getattr(torch.Tensor, name)))
        yield


@contextmanager
def without_poison() -> Iterator[None]:
    """Undo `poisoned_allocations` for a while, for weights that must not take memory before they are read."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, FUNCTIONS), (torch.Tensor, METHODS)):
            for name in names:
                function = getattr(owner, name)
                patch.setattr(owner, name, getattr(function, "__wrapped__", function))
        yield
