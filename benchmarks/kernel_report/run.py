"""The steps of a machine, traced and estimated; a module of its own, which other processes can import."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_deepseek_v4flash.config import LayerKind

from ..flash_cases import WEIGHTS
from . import estimate
from . import marlin as marlin_kernels
from .document import Traced
from .estimate import MACHINES, Machine
from .host import Host, host
from .layer import Point
from .store import Store
from .trace import Tracer


def traced(machine: Machine, weight: str, points: Sequence[Point], store: Store) -> list[Traced]:
    """Every point of one machine."""
    tracer = Tracer(machine.gpu.arch, machine.ranks, WEIGHTS[weight], store)
    found = []
    for point in points:
        layers = {kind: tracer.trace(kind, point) for kind in LayerKind}
        cost = None
        if not point.prefill:
            counts = estimate.layer_counts()
            each = {kind: host(tracer, kind, point) for kind in LayerKind}
            cost = Host(
                sum(counts[kind] * one.calls for kind, one in each.items()),
                sum(counts[kind] * one.us for kind, one in each.items()),
            )
        found.append(Traced(machine, point, weight, layers, estimate.step(machine, point, layers), cost))
        print(f"{machine}, {weight}, {point}: {found[-1].step.us / 1e3:.2f} ms (estimate)", file=sys.stderr, flush=True)
    return found


def marlin(wheel: Path, results: Sequence[Traced], store: Store) -> list[Traced]:
    """vLLM's experts in decoding steps, on the machines that its wheel has PTX for."""
    found = []
    for each in results:
        if each.machine.gpu.arch == marlin_kernels.ARCH and each.weight == "int4" and not each.point.prefill:
            call = marlin_kernels.count(wheel, each.machine.ranks, each.point, store)
            found.append(dataclasses.replace(each, layers={LayerKind.WINDOW: [call]}))
    return found


def job(given: tuple[int, list[tuple[str, list[Point]]], Path | None]) -> list[Traced]:
    """Takes the number of a machine, its points for each way to pack weights, and where profiles are kept."""
    number, steps, folder = given
    store = Store(folder)
    return [each for weight, points in steps for each in traced(MACHINES[number], weight, points, store)]
