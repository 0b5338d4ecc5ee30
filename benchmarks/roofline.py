"""The limits of a GPU, and how close a kernel comes to them: what the kernel benchmarks share.

A benchmark passes a list of `Case`s to `main`. Each case builds several copies of its inputs on the device, so that no
call finds its inputs in the L2, is compared with its reference, and is timed inside a CUDA graph, as are vLLM's kernels
for the same work (`Peer`). For every case the report, JSON and Markdown, has the time, the rates, the share of the
roofline measured in the same run, and the peer's time, or the reason why one is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import vllm_deepseek_v4flash.ops as ops

from .report import Peaks, Report, Row, describe, first_line

REPLAY_MS = 5.0
"""A replay repeats the calls for about this long, which hides the launch of the graph."""
WARM_REPLAYS, REPLAYS = 2, 11
L2_TIMES = 4
"""Together the copies of a case's inputs are this many times as large as the L2."""
MOST_COPIES = 512
COPY_BYTES, MATMUL_SIZE = 1 << 30, 8192

Call = Callable[[], Any]


class WrongResultError(AssertionError):
    """A result differs from its reference by more than its bound."""


class UnavailableError(Exception):
    """Why something cannot run here."""


@dataclass(frozen=True)
class Peer:
    """Another project's kernel for the same work."""

    name: str
    prepare: Callable[[], Work]
    """Its calls and its own check; UnavailableError if it cannot run."""


@dataclass(frozen=True)
class Work:
    """A case that is ready to run."""

    calls: Sequence[Call]
    """The same work, each on its own inputs."""
    check: Callable[[], str]
    """Compares a call's result with the reference; returns the difference as text, or raises WrongResultError."""
    peers: Sequence[Peer] = ()
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape."""

    op: str
    label: str
    bytes: int
    """What every implementation must read and write, once."""
    flops: int
    build: Callable[[Bench], Work]
    aims: Sequence[Aim] = ()


@dataclass(frozen=True)
class Aim:
    text: str
    met: Callable[[Row], bool | None]
    """None if the row lacks the measurement."""


@dataclass
class Bench:
    """Where cases are built. dry: on a CPU with Triton's interpreter and tiny shapes; nothing is timed."""

    device: torch.device
    dry: bool
    l2_bytes: int = 0
    memory_bytes: int = 1 << 30
    store: dict[Any, Any] = field(default_factory=dict)
    """What cases share, by keys of their choice."""

    @classmethod
    def on(cls, device: torch.device) -> Bench:
        if device.type != "cuda":
            return cls(device, dry=True)
        properties = torch.cuda.get_device_properties(device)
        return cls(device, False, properties.L2_cache_size, properties.total_memory)

    def copies(self, size: int) -> int:
        """How many copies of `size` bytes of input rotate; 2 in a dry run."""
        return 2 if self.dry else min(MOST_COPIES, max(1, math.ceil(L2_TIMES * self.l2_bytes / max(size, 1))))


def time_us(calls: Sequence[Call]) -> float:
    """Median microseconds of one of `calls` (the same work on different inputs), inside a CUDA graph."""
    side = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        begin.record()
        for call in calls:
            call()
        end.record()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds = max(1, math.ceil(REPLAY_MS / begin.elapsed_time(end)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            # Kept for the round: results that share memory would be overwritten in the L2.
            kept = [call() for call in calls]
    del kept
    times = []
    for _ in range(WARM_REPLAYS + REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_REPLAYS:]) * 1000 / (rounds * len(calls))


def measure_peaks(device: torch.device) -> Peaks:
    size = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copied = time_us([lambda: target.copy_(source)])
    # Random numbers: a GPU that multiplies zeros draws less power and clocks higher.
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    multiplied = time_us([lambda: torch.mm(a, b, out=out)])
    return Peaks(2 * size / copied / 1e3, 2 * MATMUL_SIZE**3 / multiplied / 1e6)


def sampled(count: int, most: int = 8) -> list[int]:
    """At most `most` of 0..count-1, evenly spaced, including the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({i * (count - 1) // (most - 1) for i in range(most)})


def compare(name: str, actual: torch.Tensor, expected: torch.Tensor, bound: float) -> float:
    """The largest relative error of a row (the last dimension): |actual - expected| / |expected|, Euclidean.

    Raises:
        WrongResultError: it is not within `bound`, or the shapes differ.
    """
    if actual.shape != expected.shape:
        raise WrongResultError(f"{name} is {tuple(actual.shape)}, the reference {tuple(expected.shape)}")
    a, e = actual.double(), expected.double()
    error = (a - e).norm(dim=-1) / e.norm(dim=-1).clamp(min=1e-30)
    worst = float(error.nan_to_num(math.inf).max())
    if not worst <= bound:
        raise WrongResultError(f"{name} is off by {worst:.2e} of a row, allowed are {bound:.2e}")
    return worst


def kernel_and_reference(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An op's Triton kernel and its PyTorch reference; UnavailableError if there is no kernel."""
    package = ops.__name__
    if importlib.util.find_spec(f"{package}.triton.{op}") is None:
        raise UnavailableError(f"{op} has no Triton kernel (ops/triton/{op}.py)")
    kernel, contract = (getattr(importlib.import_module(f"{package}{part}.{op}"), op) for part in (".triton", ""))
    return kernel, contract.reference


def run_case(case: Case, bench: Bench, peaks: Peaks | None, row: Row) -> None:
    """Check the case, time it and its peers. Errors are raised; those of peers are recorded in the row."""
    work = case.build(bench)
    row.note, row.copies = work.note, len(work.calls)
    row.checked = work.check()
    if bench.dry or peaks is None:
        work.calls[-1]()
        row.reason = "dry run: not timed"
    else:
        row.us = time_us(work.calls)
        fill_rates(row, peaks)
        if row.copies == MOST_COPIES and case.bytes * row.copies < 2 * bench.l2_bytes:
            row.note = "; ".join(filter(None, (row.note, "its inputs stay in the L2, as between layers")))
    for peer in work.peers:
        timed = _peer_us(peer, bench)
        if isinstance(timed, str):
            row.peers_not_run.append(f"{peer.name}: {timed}")
        elif timed is not None and (row.peer_us is None or timed < row.peer_us):
            row.peer, row.peer_us = peer.name, timed
    if row.us is not None:
        row.ratio = row.peer_us / row.us if row.peer_us is not None else None
        judged = ((aim.text, aim.met(row)) for aim in case.aims)
        row.aims = [f"{text}: {'met' if met else 'missed'}" for text, met in judged if met is not None]


def _peer_us(peer: Peer, bench: Bench) -> float | str | None:
    """The peer's time, the reason why there is none, or None in a dry run."""
    try:
        work = peer.prepare()
        work.check()
        return None if bench.dry else time_us(work.calls)
    except UnavailableError as error:
        return str(error)
    except WrongResultError as error:
        return f"not timed, its result is wrong: {error}"
    except torch.cuda.OutOfMemoryError as error:
        return f"does not fit: {first_line(error)}"
    except Exception as error:  # whatever a peer raises is its result, unless the device is lost
        if not bench.dry:
            torch.cuda.synchronize()
        return f"raised {type(error).__name__}: {first_line(error)}"


def fill_rates(row: Row, peaks: Peaks) -> None:
    assert row.us is not None
    row.gb_per_s, row.tflop_per_s = row.bytes / row.us / 1e3, row.flops / row.us / 1e6
    moving, computing = row.bytes / peaks.copy_gb_per_s / 1e3, row.flops / peaks.matmul_tflop_per_s / 1e6
    row.bound_by = "bandwidth" if moving >= computing else "matmul"
    row.percent = 100 * max(moving, computing) / row.us
    row.bandwidth_percent = 100 * moving / row.us


def run(
    cases: Sequence[Case], bench: Bench, report: Report, *, budget: float | None, write: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Run the cases in order for `budget` seconds, and write the report after each."""
    started = clock()
    slowest = 0.0
    stopped = ""
    for case in cases:
        before = clock() - started
        if not stopped and budget is not None and before + slowest > budget:
            stopped = f"not run: the budget of {budget:.0f} s is spent"
        if stopped:
            row = Row(case.op, case.label, case.bytes, case.flops, reason=stopped)
        else:
            row, stopped = _attempt(case, bench, report)
        report.rows.append(row)
        report.seconds = clock() - started
        slowest = max(slowest, report.seconds - before)
        print(_line(row), flush=True)
        write()


def _attempt(case: Case, bench: Bench, report: Report) -> tuple[Row, str]:
    """The row of a case; and why nothing can run after it, or an empty text."""
    row = Row(case.op, case.label, case.bytes, case.flops)
    try:
        run_case(case, bench, report.peaks, row)
        return row, ""
    except UnavailableError as error:
        row.reason = f"not run: {error}"
    except torch.cuda.OutOfMemoryError as error:
        row.reason = f"does not fit: {first_line(error)}"
    except Exception as error:  # a failed case must not stop the others; it is reported, and the exit status is 1
        if not isinstance(error, WrongResultError):
            traceback.print_exc()
        kind = "" if isinstance(error, WrongResultError) else f"{type(error).__name__}: "
        row.reason = f"FAILED: {kind}{first_line(error)}"
        report.failures.append(f"{case.op} ({case.label}): {kind}{first_line(error)}")
    if not bench.dry:
        bench.store.clear()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return row, f"not run: the device is lost since {case.op} ({case.label}): {first_line(error)}"
    return row, ""


def _line(row: Row) -> str:
    if row.us is None:
        return f"{row.op}: {row.case}: {row.reason}"
    rates = (
        f"{row.us:.2f} us, {row.gb_per_s:.0f} GB/s, {row.tflop_per_s:.1f} TFLOP/s, {row.percent:.0f} % of the roofline"
    )
    peer = f"; {row.peer} {row.peer_us:.2f} us, ratio {row.ratio:.2f}" if row.peer_us is not None else ""
    return "; ".join((f"{row.op}: {row.case}: {rates} ({row.bound_by}){peer}", *row.aims))


def main(arguments: Sequence[str], *, name: str, title: str, cases: Callable[[bool], Sequence[Case]]) -> int:
    """The command line of a benchmark; returns the exit status.

    Args:
        name: of the report's files.
        cases: called with whether this is a dry run.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="kernels, by name; default: all")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case that may end later")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {name}.json and {name}.md there")
    parser.add_argument("--commit", help="the commit in the report; default: from git")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, for the control flow alone")
    options = parser.parse_args(arguments)
    if options.dry_run:
        interpret()
    elif not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, and torch {torch.__version__} sees none. --dry-run needs none")
    chosen = list(cases(options.dry_run))
    if options.only:
        names = sorted({case.op for case in chosen})
        unknown = sorted(set(options.only) - set(names))
        if unknown:
            parser.error(f"--only {' '.join(unknown)}: there is no such kernel. Use: {', '.join(names)}")
        chosen = [case for case in chosen if case.op in options.only]
    torch.manual_seed(0)
    bench = Bench.on(torch.device("cpu" if options.dry_run else "cuda"))
    started = time.monotonic()
    report = Report(title, describe(bench.device, options.commit), None if bench.dry else measure_peaks(bench.device))
    left = None if options.budget is None else options.budget - (time.monotonic() - started)

    def write() -> None:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{name}.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
            (options.out / f"{name}.md").write_text(report.as_markdown())

    run(chosen, bench, report, budget=left, write=write)
    if not bench.dry:
        after = describe(bench.device)
        report.device |= {f"{key} at the end": value for key, value in after.items() if "clocks" in key}
        write()
    print(report.as_markdown())
    for failure in report.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def interpret() -> None:
    """Kernels that are imported later run in Triton's interpreter, which computes bf16 as a GPU does."""
    os.environ["TRITON_INTERPRET"] = "1"
    from testing.interpreter import correct

    correct()
