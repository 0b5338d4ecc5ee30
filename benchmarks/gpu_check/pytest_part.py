"""The part `tests`: every test that is marked `gpu`, in this process, as far as the time lasts."""

from __future__ import annotations

import pytest

from .environment import ROOT
from .results import Check, FailedError, NotRunError, Recorder

DRY = ("tests/test_gpu.py", "tests/ops/triton/test_launch.py")
"""What a dry run collects: without a GPU all of it is skipped."""
MOST_NAMED = 200
STOPPED = "stopped: its time was spent"


class Watcher:
    """Counts the outcomes, writes them down as they come, and ends the run when its time is spent."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.total = 0
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.stopped = False
        self.skips: dict[str, int] = {}

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
        """A test counts once: when it has been called, or where its setup or its end went otherwise than well."""
        if report.passed and report.when != "call":
            return
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skips[reason] = self.skips.get(reason, 0) + 1
        self.outcomes[report.outcome] += 1
        if report.failed:
            self.fail(f"{report.nodeid}{'' if report.when == 'call' else f' ({report.when})'}", report)
        self.recorder.result.data["tests"] = dict(self.outcomes)

    def fail(self, name: str, report: pytest.TestReport) -> None:
        if self.outcomes["failed"] <= MOST_NAMED:
            crash = getattr(report.longrepr, "reprcrash", None)
            detail = crash.message if crash is not None else str(report.longrepr)[-500:]
            check = Check(name, "failed", " ".join(detail.split())[:500], round(report.duration, 1))
            self.recorder.result.checks.append(check)
            self.recorder.write()


def run(recorder: Recorder) -> None:
    recorder.attempt("pytest -m gpu", lambda: tests(recorder))


def tests(recorder: Recorder) -> str:
    """Run them; what came of them as text, FailedError if one failed."""
    watcher = Watcher(recorder)
    junit = recorder.path.parent / "tests.xml"
    chosen = list(DRY) if recorder.dry else []
    arguments = [*chosen, "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", f"--rootdir={ROOT}"]
    status = pytest.main([*arguments, "-c", str(ROOT / "pyproject.toml")], plugins=[watcher])
    counts, done = watcher.outcomes, sum(watcher.outcomes.values())
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if watcher.stopped:
        text += f", {watcher.total - done} not run because the time was spent"
    if watcher.skips:
        recorder.result.notes.append(
            "Skipped: " + "; ".join(f"{count} x {reason}" for reason, count in sorted(watcher.skips.items()))
        )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED):
        raise FailedError(f"{text}; pytest ended with {pytest.ExitCode(status).name}")
    if not counts["passed"]:
        raise NotRunError(text)
    return text
