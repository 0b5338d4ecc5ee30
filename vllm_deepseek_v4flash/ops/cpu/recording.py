"""Repeats a function without its Python, as a CUDA graph does on a GPU.

A recorded function's kernels and torch calls are repeated on the tensors that they had, so whatever differs from one
run to the next must be stored in those tensors, at the same addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import threads

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default}
# Ops whose results depend on more than the shapes, dtypes and content of their tensors, or have other shapes each time.
_ELSEWHERE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class Recording(TorchDispatchMode):
    """Records what runs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
        """The op's name, what to call and its arguments."""
        self.obstacle = ""
        """The op whose call would not repeat what was recorded; empty if there is none."""
        self.bytes = 0
        """Of memory that is kept for the calls."""
        self._kept: list[Any] = []

    def __enter__(self) -> Any:
        threads.record(self.launched)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        threads.record(None)
        super().__exit__(*exception)
        if self.obstacle:
            self.calls, self._kept, self.bytes = [], [], 0

    def launched(self, kernel: Any, function: Callable[..., Any], arguments: tuple[Any, ...], room: Any) -> None:
        """Note that a kernel runs as `function(*arguments)`, in memory that belongs to `room`."""
        self._kept.append(room)
        self.calls.append((kernel.py_func.__module__.rpartition(".")[2], function, arguments))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self._kept += args, kwargs, result
        if function._schema.is_mutable or not made:
            self.calls.append((str(function), lambda: function(*args, **kwargs), ()))
        elif not all(_memory(t) in given for t in made):
            self.bytes += sum(t.untyped_storage().nbytes() for t in made)
            if function not in _EMPTY:
                self.calls.append((str(function), lambda: _again(function(*args, **kwargs), result), ()))
        mask = function is _aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if mask or (function is not _aten.index.Tensor and any(tag in function.tags for tag in _ELSEWHERE)):
            self.obstacle = str(function)
        return result

    def replay(self) -> None:
        """Repeat the calls in their order."""
        for _, function, arguments in self.calls:
            function(*arguments)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _again(new: Any, old: Any) -> None:
    """Copy a new result into the recorded one."""
    if isinstance(old, torch.Tensor):
        old.copy_(new)
    else:
        for new_part, old_part in zip(new, old, strict=True):
            _again(new_part, old_part)
