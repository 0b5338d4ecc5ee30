"""The part `tests`: every test that is marked `gpu`, in this process, until the time is over."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from .environment import ROOT
from .results import Check, FailedError, NotRunError, Recorder

DRY: Sequence[str] = ("tests/test_gpu.py", "tests/ops/triton/test_launch.py")
"""The files of a dry run; without a GPU all their tests are skipped."""
MOST_NAMED = 200
STOPPED = "stopped: its time is over"


class Watcher:
    """Counts outcomes, records them as they arrive, and ends the run when its time is over."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.total = 0
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.stopped = False
        self.skips: dict[str, int] = {}
        self.missing: dict[str, list[str]] = {}
        """Files that were not collected, by the missing package that they import."""
        self.uncollected = 0

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.failed:
            return
        package = re.search(r"ModuleNotFoundError: No module named '([^']+)'", str(report.longrepr))
        if package is not None:
            self.missing.setdefault(package[1], []).append(report.nodeid)
        else:
            self.uncollected += 1
            self.fail(f"{report.nodeid} (collection)", str(report.longrepr)[-500:], 0.0)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.recorder.result.running = nodeid
        if sum(self.outcomes.values()) % 50 == 0 or self.recorder.left < 60:
            self.recorder.write()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self.recorder.left <= 0:
            self.stopped = True
            item.session.shouldstop = STOPPED
            return True
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test counts once: after its call, or if its setup or teardown did not pass."""
        if report.passed and report.when != "call":
            return
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skips[reason] = self.skips.get(reason, 0) + 1
        self.outcomes[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            detail = crash.message if crash is not None else str(report.longrepr)[-500:]
            self.fail(f"{report.nodeid}{'' if report.when == 'call' else f' ({report.when})'}", detail, report.duration)
        self.recorder.result.data["tests"] = dict(self.outcomes)

    def fail(self, name: str, detail: str, seconds: float) -> None:
        if self.outcomes["failed"] <= MOST_NAMED:
            check = Check(name, "failed", " ".join(detail.split())[:500], round(seconds, 1))
            self.recorder.result.checks.append(check)
            self.recorder.write()


def files() -> list[str]:
    """The files with tests marked `gpu`. Collecting all others takes longer than running some of these."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if "gpu_check" not in path.name and path.name != "test_v2_runner.py" and "mark.gpu" in path.read_text():
            found.add(path.parent if path.name == "conftest.py" else path)
    inner = {path for path in found if any(parent in found for parent in path.parents)}
    return sorted(str(path.relative_to(ROOT)) for path in found - inner)


def run(recorder: Recorder) -> None:
    recorder.attempt("pytest -m gpu", lambda: tests(recorder))


def tests(recorder: Recorder) -> str:
    """Run them; the outcomes as text, FailedError if one failed."""
    watcher = Watcher(recorder)
    junit = recorder.path.parent / "tests.xml"
    chosen = [str(ROOT / name) for name in (DRY if recorder.dry else files())]
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={junit}"]
    where = [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    status = pytest.main([*chosen, "-m", "gpu", *options, *where], plugins=[watcher])
    counts, done = watcher.outcomes, sum(watcher.outcomes.values())
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if watcher.stopped:
        text += f", {watcher.total - done} not run because the time was over"
    if watcher.skips:
        recorder.result.notes.append(
            "Skipped: " + "; ".join(f"{count} x {reason}" for reason, count in sorted(watcher.skips.items()))
        )
    for package, names in sorted(watcher.missing.items()):
        recorder.result.notes.append(f"Not collected, because {package} is missing: {', '.join(names)}")
    # For pytest a file that imports a missing package is a failure.
    right = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    right |= {pytest.ExitCode.TESTS_FAILED} if watcher.missing else set()
    right |= {pytest.ExitCode.INTERRUPTED, pytest.ExitCode.TESTS_FAILED} if watcher.stopped else set()
    if counts["failed"] or watcher.uncollected or status not in right:
        raise FailedError(f"{text}; pytest ended with {pytest.ExitCode(status).name}")
    if not counts["passed"]:
        raise NotRunError(text)
    return text
