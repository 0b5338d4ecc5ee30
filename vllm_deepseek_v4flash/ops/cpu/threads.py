"""Calls a kernel with scratch memory, on several threads if it has enough work."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_WORTH_A_THREAD = 1.5e6
"""Multiplications, 100 us or more: handing a part to a thread takes about 50 us."""


class _Room(threading.local):
    """A thread's scratch memory, fp32 values, which grows and is kept; and the recorder of what the thread runs."""

    values = torch.empty(0)
    recorder: Callable[..., None] | None = None
    """Told of each kernel that the thread runs (`recording.py`)."""

    def address(self, count: int) -> int:
        if self.values.numel() < count:
            self.values = torch.empty(count, dtype=torch.float32)
        return self.values.data_ptr()


_room = _Room()


def run(kernel: Callable[..., None], items: int, work: float, room: int, *args: Any) -> None:
    """Call `kernel(begin, end, address, *args)` until all of range(items) is done, on as many threads as pay off.

    Not Numba's own threads: theirs and torch's would spin for the same cores.

    Args:
        work: multiplications in all.
        room: fp32 values at the address that is the kernel's alone, with any content.
    """
    threads = 1 if work < 2 * _WORTH_A_THREAD else min(torch.get_num_threads(), items, int(work / _WORTH_A_THREAD))
    if _room.recorder is not None:
        if threads == 1:
            _room.recorder(kernel, _entry(kernel), (0, items, _room.address(room), *args), _room.values)
        else:
            _room.recorder(kernel, run, (kernel, items, work, room, *args), None)
    if threads == 1:
        kernel(0, items, _room.address(room), *args)
        return
    bounds = [items * i // threads for i in range(threads + 1)]

    def part(i: int) -> None:
        kernel(bounds[i], bounds[i + 1], _room.address(room), *args)

    others = [_pool().submit(part, i) for i in range(1, threads)]
    part(0)
    for other in others:
        other.result()


def record(recorder: Callable[..., None] | None) -> None:
    """Tell `recorder(kernel, function, arguments, room)` of each kernel that this thread runs from now on."""
    _room.recorder = recorder


def _entry(kernel: Any) -> Callable[..., None]:
    """The compiled function itself: without Numba's dispatcher, which inspects the type of every argument."""
    (compiled,) = kernel.overloads.values()
    return compiled.entry_point


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="deepseek_v4flash")


# A forked child has the pool, but none of its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
