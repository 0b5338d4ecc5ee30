"""The command line: runs the parts one after another and writes the report after each."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import environment
from .parts import GRACE, PARTS, Part, seconds_for
from .process import run_part
from .report import CheckReport
from .results import PartResult

RESULTS = environment.ROOT / "benchmarks" / "results"
BUDGET = 480.0
DESCRIBE_SECONDS = 300.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m checks.gpu_check", description="Checks everything on a GPU.")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"parts to run: {', '.join(names)}; default: all")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:.0f}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<date>-<device>")
    parser.add_argument("--commit", help="the commit in the report; default: from git")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes; nothing is measured")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: there is no such part. Use: {', '.join(names)}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 if a part failed, 2 if there is no GPU."""
    options = parse(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        metadata = environment.write_metadata(Path(scratch) / "metadata")
        variables = environment.part_environment(metadata, options.dry_run)
        described = describe(Path(scratch), variables, options.dry_run)
        device = described.data.get("device", {})
        if not described.data.get("usable"):
            print(described.log or f"no GPU: {device.get('device')}. --dry-run needs none", file=sys.stderr)
            return 2
        if options.commit:
            device["commit"] = options.commit
        out = options.out or default_directory(device, options.dry_run)
        out.mkdir(parents=True, exist_ok=True)
        report = CheckReport(options.dry_run, device, list(arguments), options.budget)
        run_all(report, out, variables, options, started)
        if not options.dry_run:
            after = describe(Path(scratch), variables, dry=False).data.get("device", {})
            report.device |= {f"{key} at the end": value for key, value in after.items() if "clocks" in key}
        report.seconds = time.monotonic() - started
        paths = report.write(out)
    print("\n".join(["", report.title, *report.summary(), "", f"The report is in {paths[1]} and {paths[0].name}."]))
    return 1 if report.failed else 0


def run_all(
    report: CheckReport, out: Path, variables: dict[str, str], options: argparse.Namespace, started: float
) -> None:
    """Run the chosen parts, each for its share of the remaining budget."""
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    # A report from the start: it stays if this process is killed.
    report.parts = [PartResult(part.name, reason="not reached") for part in chosen]
    report.write(out)
    for number, part in enumerate(chosen):
        left = report.budget - (time.monotonic() - started) - GRACE
        report.parts[number] = run_one(part, chosen[number + 1 :], left, out, variables, options.dry_run)
        report.seconds = time.monotonic() - started
        report.write(out)
        result = report.parts[number]
        print(f"{part.name}: {result.status}{f': {result.reason}' if result.reason else ''}", flush=True)


def run_one(part: Part, rest: list[Part], left: float, out: Path, variables: dict[str, str], dry: bool) -> PartResult:
    """left: the seconds of the budget for this part and `rest`."""
    least = 0.0 if dry else part.least
    if left <= least:
        reason = f"{max(0.0, left):.0f} s of the budget are left, it needs at least {least:.0f}"
        return PartResult(part.name, reason=reason)
    seconds = min(left, max(least, seconds_for(part, rest, left)))
    print(f"{part.name}: {part.shows}; for up to {seconds:.0f} s", flush=True)
    return run_part(part, out, seconds, variables, dry)


def describe(scratch: Path, variables: dict[str, str], dry: bool) -> PartResult:
    part = Part("describe", "", 0, 1)
    return run_part(part, scratch, DESCRIBE_SECONDS, variables, dry)


def default_directory(device: dict[str, Any], dry: bool) -> Path:
    """The directory of a report. Reports of dry runs are never stored with measurements."""
    if dry:
        return Path(tempfile.mkdtemp(prefix="gpu-check-dry-run-"))
    name = re.sub(r"[^a-z0-9]+", "-", device["device"].partition(",")[0].lower()).strip("-")
    return RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{name}"
