"""Compiles every kernel, Triton's and CUDA's, ahead of time for every supported GPU; no GPU is used.

    python -m checks.compile_table [--arch 80 90] [--kernel sparse_attention ...] [--common] [--output TABLE.md]
                                   [--triton 3.7.1 3.8.0]

The ops run on tensors without memory (`flash_cases.py`), and every launch that they make is specialised as Triton
would at run time and compiled. Exits with 1, and says what and where, if a kernel does not compile, needs more shared
memory than the GPU has, spills registers that compile_report.SPILLS does not list, or has too large a grid.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vllm_deepseek_v4flash.ops as ops
from benchmarks.flash_cases import CASES, Case
from testing.ptxrun.triton_kernels import compiler, device
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.triton.launch import recorded

from . import cuda_usage
from .compile_report import ARCHS, Row, Usage, as_table, document, read_rows, violations, write_rows

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ROOT / "scripts" / "versions.py"
TENSOR_MEMORY_COLUMNS = 512  # of sm_100
LARGEST_GRID = (2**31 - 1, 65535, 65535)


@dataclass
class Job:
    """One kernel in one specialisation for one architecture, and the cases that launch it."""

    name: str
    arch: int
    source: ASTSource
    options: Any
    constants: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def launches(cases: Iterable[Case], arch: int) -> list[Job]:
    """Every distinct kernel that the cases start on `arch`."""
    jobs: dict[tuple[str, str], Job] = {}
    for case in cases:

        def record(
            kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], case: Case = case
        ) -> None:
            source, compiled, bound = compiler(arch).specialised(kernel, args, options)
            named = _named(kernel, bound, source.constants)
            key = (source.hash(), compiled.hash())
            job = jobs.setdefault(key, Job(_name(kernel), arch, source, compiled, named))
            if case not in job.cases:
                job.cases.append(case)
            if any(size > largest for size, largest in zip(grid, LARGEST_GRID, strict=False)):
                job.broken.append(f"the grid {grid} of {case.axes} is larger than {LARGEST_GRID}")

        with recorded(device(arch), record):
            case.run()
    return list(jobs.values())


def _named(kernel: Any, bound: dict[str, Any], constants: dict[tuple[int, ...], Any]) -> dict[str, Any]:
    """What is compiled in, by name; members of structs are `struct.member`."""
    found: dict[str, Any] = {}
    for (first, *rest), value in constants.items():
        name = kernel.arg_names[first]
        struct = bound[name]
        for index in rest:
            name, struct = f"{name}.{struct._fields[index]}", struct[index]
        if hasattr(value, "_fields"):
            found |= {f"{name}.{member}": item for member, item in zip(value._fields, value, strict=True)}
        else:
            found[name] = value
    return found


def _name(kernel: Any) -> str:
    file, function = kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__.lstrip("_")
    return file if function == file else f"{file}: {function}"


def usage_of(job: Job) -> Usage | str:
    """What the compiled kernel needs, or why it does not compile."""
    try:
        compiled = triton.compile(job.source, target=GPUTarget("cuda", job.arch, 32), options=vars(job.options))
    except Exception as error:  # whatever the compiler raises is the result
        return f"does not compile: {_reason(error)}"
    if getattr(compiled.metadata, "tmem_size", 0) > TENSOR_MEMORY_COLUMNS:
        return f"needs {compiled.metadata.tmem_size} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {listing!r}")
    registers, stack, _, local = map(int, found.groups())
    return Usage(registers, compiled.metadata.shared, stack + local)


def _reason(error: BaseException) -> str:
    """One line on the innermost of Triton's errors, which wrap one another from call to call."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


def triton_rows(cases: Sequence[Case], archs: Sequence[int]) -> list[Row]:
    """Compile what the cases launch, on every core."""
    jobs = [job for arch in archs for job in launches(cases, arch)]
    # Forked, because neither a kernel nor a case can be sent to another process.
    _shared_jobs[:] = jobs
    usages = []
    with multiprocessing.get_context("fork").Pool() as pool:
        for usage in pool.imap(_usage_of_shared, range(len(jobs))):
            usages.append(usage)
            if sys.stderr.isatty():
                print(f"\r{len(usages)} of {len(jobs)} compiled ", end="", file=sys.stderr, flush=True)
    rows = []
    for (job, usage), label in zip(zip(jobs, usages, strict=True), _labels(jobs), strict=True):
        broken = list(job.broken)
        if isinstance(usage, str):
            broken.append(usage)
        else:
            broken += violations(usage, job.arch, job.name)
        found = None if isinstance(usage, str) else usage
        rows.append(Row(job.name, label, job.arch, found, tuple(broken), triton.__version__))
    return rows


def cuda_rows(archs: Sequence[int]) -> list[Row]:
    """The kernels of csrc/, where there is an nvcc; none, and a line that says so, where there is not."""
    if cuda_usage.nvcc() is None:
        print("csrc/ is not in the table: there is no nvcc", file=sys.stderr)
        return []
    rows = []
    for arch, compiled in cuda_usage.compile_all(list(archs)).items():
        if isinstance(compiled, str):
            rows.append(Row("csrc", "", arch, None, (compiled,)))
            continue
        for kernel in compiled:
            usage = Usage(kernel.registers, kernel.shared, kernel.spilled)
            name = f"csrc/{kernel.source}: {kernel.function}"
            rows.append(Row(name, f"weight {kernel.weight}", arch, usage, tuple(violations(usage, arch))))
    return rows


_shared_jobs: list[Job] = []


def _usage_of_shared(index: int) -> Usage | str:
    return usage_of(_shared_jobs[index])


def _labels(jobs: list[Job]) -> list[str]:
    """What tells each job from the others of its kernel and architecture, in the axes' words."""
    launching: dict[tuple[str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for job in jobs:
        launching[job.name, job.arch] |= {id(case): _axes(case) for case in job.cases}
    labels = [_label(job, list(launching[job.name, job.arch].values())) for job in jobs]
    alike: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for index, (job, label) in enumerate(zip(jobs, labels, strict=True)):
        alike[job.name, job.arch, label].append(index)
    for indices in alike.values():
        # One call may launch a kernel more than once; then only its constants tell the launches apart.
        names = {name for i in indices for name in jobs[i].constants}
        differing = sorted(n for n in names if len({str(jobs[i].constants.get(n)) for i in indices}) > 1)
        for i in indices if len(indices) > 1 else ():
            constants = (f"{n}={jobs[i].constants.get(n)}" for n in differing)
            labels[i] = ", ".join(part for part in (labels[i], *constants) if part)
    return labels


def _axes(case: Case) -> dict[str, Any]:
    return {"op": case.op, **case.axes}


def _label(job: Job, launching: list[dict[str, Any]]) -> str:
    """The axes whose values matter: those that do not take every value that the others allow, and the dtype."""
    axes = list(dict.fromkeys(axis for case in job.cases for axis in _axes(case)))
    taken = {axis: list(dict.fromkeys(_axes(case).get(axis) for case in job.cases)) for axis in axes}
    parts = []
    for axis in axes:
        others = [c for c in launching if all(c.get(a) in taken[a] for a in axes if a != axis and axis != "dtype")]
        if set(taken[axis]) != {other.get(axis) for other in others}:
            parts.append(f"{axis} {'/'.join(map(str, taken[axis]))}")
    return ", ".join(parts)


def without_cases(cases: Sequence[Case]) -> list[str]:
    """The ops that have Triton kernels but no case."""
    kernels = {path.stem for path in (Path(ops.__file__).parent / "triton").glob("*.py")}
    implemented = {op.__name__ for op in dispatch.ops()} & kernels
    return sorted(implemented - {case.op for case in cases})


def rows_of_versions(versions: Sequence[str], arguments: Sequence[str]) -> list[Row]:
    """`triton_rows` of each version of Triton, in a process of its own with these `arguments`.

    Raises:
        subprocess.CalledProcessError: a version cannot be installed, or its process fails.
    """
    rows = []
    for version in versions:
        command = [sys.executable, str(VERSIONS), "triton", version]
        folder = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        path = [folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            subprocess.run(
                [sys.executable, "-m", "checks.compile_table", *arguments, "--rows", file.name],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}, cwd=ROOT, check=True,
            )  # fmt: skip
            rows += read_rows(Path(file.name))
    return rows


def selection(options: argparse.Namespace) -> list[str]:
    """The arguments that select what is compiled."""
    chosen = ["--arch", *map(str, options.arch)]
    chosen += ["--kernel", *options.kernel] if options.kernel else []
    return chosen + (["--common"] if options.common else [])


def main(arguments: Sequence[str], cases: Sequence[Case] | None = None) -> int:
    """Compile `cases` (default: all of Flash's) and report; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS), help="e.g. 80 90")
    parser.add_argument("--kernel", nargs="+", help="ops, by their file in ops/triton; default: all")
    parser.add_argument("--common", action="store_true", help="only the configurations that most users run")
    parser.add_argument("--output", type=Path, help="write the table there too, as Markdown")
    parser.add_argument("--triton", nargs="+", metavar="VERSION", help="of other versions than the installed one")
    parser.add_argument("--rows", type=Path, help="write what Triton compiled there as JSON, and nothing else")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 makes Triton interpret kernels instead of compiling them: unset it")
    own = cases is None
    missing = without_cases(CASES) if cases is None else []
    cases = CASES if cases is None else cases
    if options.kernel:
        unknown = sorted(set(options.kernel) - {case.op for case in cases})
        if unknown:
            parser.error(f"no cases for {', '.join(unknown)}; there are: {', '.join(sorted({c.op for c in cases}))}")
        cases, missing = [case for case in cases if case.op in options.kernel], []
    if options.triton:
        rows = rows_of_versions(options.triton, selection(options))
    else:
        rows = triton_rows([case for case in cases if case.common or not options.common], options.arch)
    if options.rows is not None:
        write_rows(rows, options.rows)
        return 0
    if own and not options.kernel:
        rows += cuda_rows(options.arch)
    print(as_table(rows, options.arch))
    if options.output is not None:
        options.output.write_text(document(rows, options.arch, options.common))
    problems = [f"{op}: no case in benchmarks/flash_cases.py compiles it" for op in missing]
    for row in rows:
        version = f", Triton {row.triton}" if options.triton and row.triton else ""
        where = f"sm_{row.arch}{version}, {row.kernel} ({row.configuration or 'all'})"
        problems += [f"{where}: {what}" for what in row.broken]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
