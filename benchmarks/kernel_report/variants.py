"""Kernels that Triton compiles during a request, because start-up did not need them: each takes a second or more.

Start-up is vLLM's profiling run, in which the attention's kernels also take decoding steps of some sizes
(`kv_cache/layer_caches.py`). Every op runs on Triton here, as in an installation without csrc/'s library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vllm_deepseek_v4flash.config import LayerKind
from vllm_deepseek_v4flash.kv_cache import layer_caches
from vllm_deepseek_v4flash.kv_cache.layer_step import LayerStep

from . import layer as layers
from .layer import Point
from .trace import Tracer

MOST_TOKENS, MAX_MODEL_LEN = 8192, 1 << 17
"""Of the profiling run: tokens of a step, and the context that it must be ready for."""
STEPS = (Point(new=37), Point(1, 37), Point(8, 1 << 13), Point(new=1500), Point(3, 0, 200), Point(32, 1 << 13))
"""What a server sees first: a short prompt and its answer, a batch, longer prompts."""


class _Launches:
    """Notes the specialisations that launches need."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.known: dict[tuple[str, str], str] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if all(grid):
            self.known.setdefault(self.tracer.compiler.variant(kernel, args, options), kernel.fn.__name__)

    def step(self, kind: LayerKind, point: Point, steps: list[LayerStep] | None = None) -> None:
        with self.tracer.launching(kind, point, self, steps) as call:
            call()


def compiled_after_start(tracer: Tracer, points: Sequence[Point] = STEPS) -> dict[Point, list[str]]:
    """The kernels, by name, that each step compiles when start-up and all steps before it have run."""
    launches = _Launches(tracer)
    for kind in LayerKind:
        launches.step(kind, Point(new=MOST_TOKENS), _profiling(kind))
    found = {}
    for point in points:
        before = set(launches.known)
        for kind in LayerKind:
            launches.step(kind, point)
        found[point] = sorted(launches.known[variant] for variant in launches.known.keys() - before)
    return found


def _profiling(kind: LayerKind) -> list[LayerStep]:
    """What the attention computes in vLLM's profiling run: decoding steps, then as many tokens as a step can have."""
    points = [Point(size) for size in layer_caches._DECODE_SIZES] + [Point(new=MOST_TOKENS)]
    ratio = {LayerKind.WINDOW: 0, LayerKind.CSA: 4, LayerKind.HCA: 128}[kind]
    entries = MAX_MODEL_LEN // ratio if ratio else 0
    return [dataclasses.replace(layers.step_of(kind, point), max_entries=entries) for point in points]
