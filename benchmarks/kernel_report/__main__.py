"""Counts what the compiled kernels do in a step of DeepSeek-V4-Flash, and estimates how long it takes. Needs no GPU.

    python -m benchmarks.kernel_report [--machine A100 ...] [--weight int4 fp4] [--short] [--write FILE]

Each machine runs in a process of its own. nvcc is needed for the kernels of csrc/.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

from testing.ptxrun import cuda_kernels
from vllm_deepseek_v4flash.config import LayerKind

from ..flash_cases import WEIGHTS
from . import estimate
from .document import Traced, document
from .estimate import MACHINES, Machine
from .layer import Point
from .plot import bars
from .trace import Tracer

DECODE = [Point(requests, context) for context in (1 << 13, 1 << 17, 1 << 20) for requests in (1, 8, 32)]
PREFILL = [Point(new=2048), Point(new=8192)]
SHORT = [Point(1, 1 << 13), Point(8, 1 << 13)]


def traced(machine: Machine, weight: str, points: Sequence[Point]) -> list[Traced]:
    """Every point of one machine."""
    tracer = Tracer(machine.gpu.arch, machine.ranks, WEIGHTS[weight])
    found = []
    for point in points:
        layers = {kind: tracer.trace(kind, point) for kind in LayerKind}
        host = None
        if not point.prefill:
            counts = estimate.layer_counts()
            host = sum(counts[kind] * tracer.host_us(kind, point) for kind in LayerKind) / 1e3
        found.append(Traced(machine, point, weight, layers, estimate.step(machine, point, layers), host))
        print(f"{machine}, {weight}, {point}: {found[-1].step.us / 1e3:.2f} ms (estimate)", file=sys.stderr, flush=True)
    return found


def _traced(job: tuple[int, str, list[Point]]) -> list[Traced]:
    number, weight, points = job
    return traced(MACHINES[number], weight, points)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    names = [machine.gpu.name for machine in MACHINES]
    parser.add_argument("--machine", nargs="+", choices=names, default=names, help="by GPU; default: all")
    parser.add_argument("--weight", nargs="+", choices=("int4", "fp4"), default=["int4", "fp4"])
    parser.add_argument("--short", action="store_true", help="batch 1 and 8 at 8k only")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the report there, and its plot next to it")
    options = parser.parse_args(arguments)
    if cuda_kernels.nvcc() is None:
        parser.error("nvcc: not found, and csrc/'s kernels are part of a step. Install the CUDA toolkit.")
    jobs: list[tuple[int, str, list[Point]]] = []
    for number, machine in enumerate(MACHINES):
        for weight in options.weight if machine.gpu.name in options.machine else ():
            # FP4 differs from int4 in experts and linears, which do not depend on the context.
            many = weight == "int4" and not options.short
            jobs.append((number, weight, [*DECODE, *PREFILL] if many else SHORT))
    if len(jobs) == 1:
        results = _traced(jobs[0])
    else:
        with multiprocessing.get_context("spawn").Pool(maxtasksperchild=1) as pool:
            results = [each for found in pool.imap(_traced, jobs) for each in found]
    text = document(results)
    if options.write is None:
        print(text)
        return 0
    options.write.write_text(text)
    decode = [each for each in results if not each.point.prefill and each.weight == "int4"]
    rows = [
        (f"{each.machine}, {each.point}", {k: v / 1e3 for k, v in each.step.families.items()}, each.step.floor_us / 1e3)
        for each in decode
    ]
    options.write.with_suffix(".svg").write_text(bars("A decoding step, int4 weights, ms: an estimate", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
