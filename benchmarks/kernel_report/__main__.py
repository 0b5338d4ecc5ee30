"""Counts what the compiled kernels do in a step of DeepSeek-V4-Flash, and estimates how long it takes. Needs no GPU.

    python -m benchmarks.kernel_report [--machine A100 ...] [--weight int4 fp4] [--short] [--write FILE] [--fresh]
        [--marlin WHEEL]

Each machine runs in a process of its own. Launches that ran before, with the same code and arguments, are not executed
again (`store.py`). nvcc is needed for the kernels of csrc/.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from testing.ptxrun import cuda_kernels

from .document import document
from .estimate import MACHINES
from .layer import Point
from .plot import bars
from .run import job, marlin
from .store import Store, default_folder

DECODE = [Point(requests, context) for context in (1 << 13, 1 << 17, 1 << 20) for requests in (1, 8, 32)]
PREFILL = [Point(new=2048), Point(new=8192)]
SHORT = [Point(1, 1 << 13), Point(8, 1 << 13)]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    names = [machine.gpu.name for machine in MACHINES]
    parser.add_argument("--machine", nargs="+", choices=names, default=names, help="by GPU; default: all")
    parser.add_argument("--weight", nargs="+", choices=("int4", "fp4"), default=["int4", "fp4"])
    parser.add_argument("--short", action="store_true", help="batch 1 and 8 at 8k only")
    parser.add_argument("--fresh", action="store_true", help="execute every launch, also those that ran before")
    parser.add_argument("--marlin", type=Path, metavar="WHEEL", help="count the Marlin kernels of a wheel of vLLM, too")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the report there, and its plots next to it")
    options = parser.parse_args(arguments)
    if cuda_kernels.nvcc() is None:
        parser.error("nvcc: not found, and csrc/'s kernels are part of a step. Install the CUDA toolkit.")
    # FP4 differs from int4 in experts and linears, which do not depend on the context.
    points = {"int4": SHORT if options.short else [*DECODE, *PREFILL], "fp4": SHORT}
    steps = [(weight, points[weight]) for weight in options.weight]
    folder = None if options.fresh else default_folder()
    jobs = [(n, steps, folder) for n, machine in enumerate(MACHINES) if machine.gpu.name in options.machine]
    if len(jobs) == 1:
        results = job(jobs[0])
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), spawn, max_tasks_per_child=1) as pool:
            results = [each for found in pool.map(job, jobs) for each in found]
    text = document(results, marlin(options.marlin, results, Store(folder)) if options.marlin else ())
    if options.write is None:
        print(text)
        return 0
    options.write.write_text(text)
    for suffix, title, prefill in (
        (".svg", "A decoding step, int4 weights, ms: an estimate (*: does not fit into memory)", False),
        ("-prefill.svg", "A prompt, int4 weights, ms: an estimate (*: does not fit into memory)", True),
    ):
        rows = [
            (
                f"{each.machine}, {each.point}{'' if each.fits else '*'}",
                {family: us / 1e3 for family, us in each.step.families.items()},
                each.step.floor_us / 1e3,
            )
            for each in results
            if each.point.prefill == prefill and each.weight == "int4"
        ]
        if rows:
            options.write.with_name(options.write.stem + suffix).write_text(bars(title, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
