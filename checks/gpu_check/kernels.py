"""The part `kernels`: the benchmarks of the attention and MoE kernels, within the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .results import FailedError, Recorder

BENCHMARKS = {"moe": 0.4, "attention": 1.0}
"""The largest share of the remaining seconds that each takes."""
START = 15.0
"""Seconds that a benchmark takes in addition to its cases: imports, and measuring the GPU's peaks."""


def run(recorder: Recorder) -> None:
    for name, share in BENCHMARKS.items():
        recorder.attempt(name, benchmark(name, share, recorder), START + 10)


def benchmark(name: str, share: float, recorder: Recorder) -> Callable[[], str]:
    def measure() -> str:
        out = recorder.path.parent
        seconds = recorder.left * share - START
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out)]
        command += ["--dry-run"] if recorder.dry else ["--budget", f"{seconds:.0f}"]
        command += ["--only", *DRY[name]] if recorder.dry else []
        status = subprocess.run(command).returncode
        path = out / f"{name}.json"
        if not path.exists():
            raise FailedError(f"benchmarks.{name} ended with status {status} and wrote no report")
        report = json.loads(path.read_text())
        for file in (path, path.with_suffix(".md")):
            file.unlink()
        recorder.result.data[name] = report
        add_rows(report, name, recorder)
        return verdict(report, status)

    return measure


DRY = {"moe": ["int4"], "attention": ["topk", "route"]}
"""The cases of a dry run; the tests of the benchmarks run them all."""


def add_rows(report: dict[str, Any], name: str, recorder: Recorder) -> None:
    head = ["kernel", "case", "µs", "% of the roofline", "peer", "peer µs", "ratio", "aims"]
    table = recorder.table(f"{report['title']}: what ran", head)
    for row in report["rows"]:
        if row["checked"]:
            share = recorder.figure(row["percent"], ".0f") + (f" ({row['bound_by']})" if row["bound_by"] else "")
            table.rows.append([
                row["op"], row["case"], recorder.figure(row["us"], ".2f"), share, row["peer"],
                recorder.figure(row["peer_us"], ".2f"), recorder.figure(row["ratio"], ".2f"), "; ".join(row["aims"]),
            ])  # fmt: skip
    if report["peaks"] is not None:
        peaks = report["peaks"]
        table.note = (
            f"Measured in the same run: copies at {peaks['copy_gb_per_s']:.0f} GB/s, "
            f"bf16 products at {peaks['matmul_tflop_per_s']:.0f} TFLOP/s."
        )


def verdict(report: dict[str, Any], status: int) -> str:
    """How many cases are right; FailedError if one is wrong."""
    rows = report["rows"]
    right = sum(bool(row["checked"]) for row in rows)
    late = sum("budget" in row["reason"] for row in rows)
    text = f"{right} of {len(rows)} cases are right, {late} did not fit into the time"
    if report["failures"] or status:
        raise FailedError(f"{text}; status {status}: {'; '.join(report['failures'][:5])}")
    return text
