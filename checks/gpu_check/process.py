"""Runs a part in its own process, and ends it with all that it started when its time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .parts import GRACE, Part
from .results import PartResult

LOG_LINES = 60


def run_part(part: Part, out: Path, seconds: float, environment: dict[str, str], dry: bool) -> PartResult:
    """Run a part for `seconds`; GRACE seconds later it is killed. Returns its result with its status.

    Its output goes to `out`/NAME.log, and its results, while it runs, to `out`/NAME.part.json.
    """
    path, log = out / f"{part.name}.part.json", out / f"{part.name}.log"
    path.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "checks.gpu_check.run_part", part.name,
        "--result", str(path), "--seconds", f"{seconds:.1f}", *(["--dry-run"] if dry else []),
    ]  # fmt: skip
    started = time.monotonic()
    status = run_group(command, log, seconds + GRACE, environment)
    result = PartResult.read(path, part.name)
    result.seconds, result.limit = round(time.monotonic() - started, 1), round(seconds + GRACE, 1)
    # A dry run runs our code only.
    judge(result, status, optional=part.optional and not dry)
    if result.status == "failed" or not result.finished:
        result.log = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    path.unlink(missing_ok=True)
    return result


def run_group(command: list[str], log: Path, limit: float, environment: dict[str, str]) -> int | None:
    """The exit status, or None if the command and its children were killed after `limit` seconds."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also after its end: processes that it left would keep the next part from the GPU's memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def judge(result: PartResult, status: int | None, optional: bool) -> None:
    """Set the part's status, and the reason if it did not pass.

    Args:
        status: of its process; None if that was killed.
        optional: whatever goes wrong is not a failure.
    """
    counts = result.counts()
    during = f" during {result.running!r}" if result.running else ""
    problem = ""
    if status is None:
        problem = f"killed after its limit of {result.limit:.0f} s{during}"
    elif status < 0:
        problem = f"ended by signal {-status} ({signal.Signals(-status).name}){during}"
    elif not result.finished:
        problem = f"ended with status {status} without a complete report{during}"
    elif counts["failed"]:
        names = [check.name for check in result.checks if check.status == "failed"]
        problem = f"{counts['failed']} of {len(result.checks)} failed: {', '.join(names[:8])}"
    if problem:
        result.reason = problem
        result.status = "not run" if optional else "failed"
    elif counts["passed"]:
        result.status = "passed"
    else:
        result.status = "not run"
        result.reason = result.reason or "; ".join(dict.fromkeys(check.detail for check in result.checks))
