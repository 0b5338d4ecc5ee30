"""What a step without CUDA graphs costs on the host: Python that starts launches, counted and timed.

The launches themselves do nothing, and Triton's launcher is not called. Calls are what a budget can hold: they are the
same on every machine. The time is that of the CPU which counts, and of PyTorch's CPU functions for PyTorch's launches.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from vllm_deepseek_v4flash.config import LayerKind

from .layer import Point
from .trace import Tracer

REPETITIONS = 5


@dataclass(frozen=True)
class Host:
    """Of one layer."""

    calls: int
    """Of Python functions, and from Python of C functions."""
    us: float
    """CPU time of the fastest of some repetitions."""


def host(tracer: Tracer, kind: LayerKind, point: Point) -> Host:
    """What a layer's step costs on the host once everything is compiled."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with tracer.launching(kind, point, lambda *launch: None) as step:
        step()
        sys.setprofile(count)
        try:
            step()
        finally:
            sys.setprofile(None)
        return Host(calls, 1e6 * min(_timed(step) for _ in range(REPETITIONS)))


def _timed(step: Any) -> float:
    started = time.thread_time()
    step()
    return time.thread_time() - started
