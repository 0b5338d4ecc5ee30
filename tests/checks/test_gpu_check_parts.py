"""The parts that decide what passes (the engine's comparison, the CPU's tokens, pytest under a time limit, the kernels'
reports), and a dry run of all parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import Report, Row
from checks.gpu_check import checkpoints, engine, expected, kernels, pytest_part
from checks.gpu_check.environment import ROOT
from checks.gpu_check.expected import Reply
from checks.gpu_check.results import DRY, FailedError, NotRunError, PartResult, Recorder

RIGHT = [Reply([5, 6, 1], [3.0, 0.4, 2.0]), *([Reply([7, 1], [2.0, 2.0])] * 39)]


def parted(at: int) -> list[Reply]:
    """As RIGHT, but the first reply has another token there."""
    tokens = [*RIGHT[0].tokens]
    tokens[at] = 9
    return [Reply(tokens, RIGHT[0].gaps), *RIGHT[1:]]


def test_equal_replies():
    drifted = [Reply(RIGHT[0].tokens, [3.0, 0.45, 2.0]), *RIGHT[1:]]
    assert engine.compare(drifted, RIGHT, exact=True) == (
        "40 of 40 replies are equal, distances to the second best token within 0.050"
    )


def test_in_16_bits_a_reply_may_part_where_it_was_nearly_undecided():
    text = engine.compare(parted(1), RIGHT, exact=False)
    assert text.startswith("39 of 40 replies are equal")
    assert text.endswith("others: reply 0 from token 1 on, where 0.400 nats decided")
    with pytest.raises(FailedError, match=r"where 3\.000 nats decided"):
        engine.compare(parted(0), RIGHT, exact=False)


def test_in_fp32_no_reply_may_part():
    with pytest.raises(FailedError, match="39 of 40"):
        engine.compare(parted(1), RIGHT, exact=True)


def test_many_that_part_are_a_failure():
    close = [Reply([5, 6], [0.1, 0.1])] * 40
    others = [Reply([5, 9], [0.1, 0.1])] * 3
    assert "38 of 40" in engine.compare([*close[2:], *others[:2]], close, exact=False)
    with pytest.raises(FailedError, match="37 of 40"):
        engine.compare([*close[3:], *others], close, exact=False)


def test_a_reply_that_ends_early_parted_where_it_ended():
    short = [Reply([5, 6], [3.0, 0.4]), *RIGHT[1:]]
    with pytest.raises(FailedError, match=r"from token 2 on, where 2\.000 nats"):
        engine.compare(short, RIGHT, exact=False)


def test_the_committed_tokens_are_of_these_checkpoints_and_prompts(tmp_path):
    stored = expected.read()
    assert set(stored["replies"]) == {setting.name for setting in checkpoints.SETTINGS}
    for name in {setting.checkpoint for setting in checkpoints.SETTINGS}:
        path = checkpoints.checkpoint(name, tmp_path)
        assert checkpoints.fingerprint(path) == stored["checkpoints"][name]
    for setting in checkpoints.SETTINGS:
        replies = expected.replies(stored, setting)
        assert len(replies) == len(checkpoints.prompts(setting.checkpoint))
        assert all(len(reply.tokens) == len(reply.gaps) for reply in replies)
        if setting.exact:
            # What must be equal may not hang on the rounding of an fp32 sum.
            assert min(min(reply.gaps) for reply in replies) > 0.003


def test_the_committed_tokens_are_those_of_transformers():
    """Of the trained toy in fp32: its own list of questions holds what transformers answers."""
    stored = expected.read()
    (setting,) = (s for s in checkpoints.SETTINGS if s.name == "toy, float32, fp32 rows")
    answers = [question["greedy_token_ids"] for question in checkpoints.questions()]
    assert [reply.tokens for reply in expected.replies(stored, setting)] == answers


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(checkpoints.SETTINGS[:1], id="scheduler"),
        pytest.param(checkpoints.SETTINGS[1:], id="trained", marks=pytest.mark.slow),
    ],
)
def test_the_committed_tokens_are_current(settings):
    stored, made = expected.read(), expected.compute(settings)
    for setting in settings:
        for ours, theirs in zip(expected.replies(made, setting), expected.replies(stored, setting), strict=True):
            assert ours.tokens == theirs.tokens, f"{setting.name}: run python -m checks.gpu_check.expected"


def test_every_start_is_of_a_setting_whose_tokens_are_known():
    starts = engine.starts(dry=False)
    assert {start.setting for start in starts} == set(checkpoints.SETTINGS)
    assert len({start.name for start in starts}) == len(starts)
    assert any(not start.graphs for start in starts)
    assert any(start.alone == 64 and start.setting.exact for start in starts)


MADE_UP_TESTS = """
import pytest, time
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no such GPU")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("no device")
def test_broken(broken): pass
"""
# Time passes only where a test moves the clock on.
RUN_TESTS = """
import sys, types
from pathlib import Path
from checks.gpu_check import pytest_part
from checks.gpu_check.results import Recorder
sys.modules["clock"] = clock = types.SimpleNamespace(now=0.0)
pytest_part.DRY = sys.argv[3:]
recorder = Recorder("tests", Path(sys.argv[1]), float(sys.argv[2]), dry=True, clock=lambda: clock.now)
pytest_part.run(recorder)
recorder.finish()
"""


def run_tests(tmp_path: Path, code: str, seconds: float, *files: str) -> PartResult:
    (tmp_path / "test_made_up.py").write_text(code)
    chosen = [str(tmp_path / name) for name in files or ("test_made_up.py",)]
    arguments = [str(tmp_path / "part.json"), str(seconds), *chosen]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", RUN_TESTS, *arguments], env=environment, check=True, capture_output=True)
    return PartResult.read(tmp_path / "part.json", "tests")


def test_tests_that_fail_are_named_and_counted(tmp_path):
    result = run_tests(tmp_path, MADE_UP_TESTS, 60)
    assert result.data["tests"] == {"passed": 1, "failed": 2, "skipped": 1}
    bad, broken, run = result.checks
    assert bad.name.endswith("::test_bad")
    assert "one is not two" in bad.detail
    assert broken.name.endswith("::test_broken (setup)")
    assert (run.status, run.detail) == ("failed", "1 passed, 2 failed, 1 skipped; pytest ended with TESTS_FAILED")
    assert result.notes == ["Skipped: 1 x Skipped: no such GPU"]
    assert (tmp_path / "tests.xml").exists()


def test_tests_stop_when_their_time_is_over(tmp_path):
    code = "import clock, pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('n', range(30))\n"
    code += "def test_slow(n): clock.now += 4\n"
    result = run_tests(tmp_path, code, 6)
    (run,) = result.checks
    assert (run.status, run.detail) == (
        "passed", "2 passed, 0 failed, 0 skipped, 28 not run because the time was over",
    )  # fmt: skip


def test_tests_whose_packages_are_missing_are_said_not_to_run(tmp_path):
    (tmp_path / "test_lacking.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "test_wrong.py").write_text("raise ValueError('a wrong test file')\n")
    result = run_tests(tmp_path, MADE_UP_TESTS, 60, "test_made_up.py", "test_lacking.py")
    names = [check.name.rpartition("::")[2] for check in result.checks]
    assert names == ["test_bad", "test_broken (setup)", "pytest -m gpu"]
    assert any(note.startswith("Not collected, because no_such_package_at_all is missing:") for note in result.notes)
    result = run_tests(tmp_path, "", 60, "test_wrong.py")
    assert [check.status for check in result.checks] == ["failed", "failed"]
    assert "a wrong test file" in result.checks[0].detail


def test_only_files_with_gpu_tests_are_collected():
    found = set(pytest_part.files())
    assert {"tests/test_gpu.py", "tests/csrc/test_experts.py", "tests/ops"} <= found
    assert not any("gpu_check" in name for name in found)
    # Not each file again that a directory holds.
    assert not any(name.startswith("tests/ops/") for name in found)


def report_of(*rows: Row, failures: tuple[str, ...] = ()) -> dict:
    return Report("Title", {}, None, list(rows), list(failures)).as_json()


def test_the_kernels_verdict(tmp_path):
    right = Row("topk", "8 rows", 1, 1, us=12.5, percent=50.0, bound_by="bandwidth", checked="equal", aims=["x: met"])
    late = Row("topk", "9 rows", 1, 1, reason="not run: the budget of 9 s is spent")
    absent = Row("topk", "10 rows", 1, 1, reason="not run: needs a GPU")
    report = report_of(right, late, absent)
    assert kernels.verdict(report, 0) == "1 of 3 cases are right, 1 did not fit into the time"
    with pytest.raises(FailedError, match="status 1: topk is off"):
        kernels.verdict(report_of(right, failures=("topk is off",)), 1)
    recorder = Recorder("kernels", tmp_path / "part.json", 60, dry=False)
    kernels.add_rows(report, "attention", recorder)
    (table,) = recorder.result.tables
    assert table.rows == [["topk", "8 rows", "12.50", "50 (bandwidth)", "", "", "", "x: met"]]


def test_what_cannot_run_in_the_long_part_is_said(tmp_path):
    from benchmarks.roofline import UnavailableError
    from checks.gpu_check import long

    def build(bench: object) -> None:
        raise UnavailableError("no kernel")

    case: Any = types.SimpleNamespace(build=build)
    bench: Any = types.SimpleNamespace(dry=True)
    with pytest.raises(NotRunError, match="no kernel"):
        long.checked(case, bench)()


def test_the_long_part_is_at_a_million_tokens():
    from checks.gpu_check import long

    labels = [f"{case.op} {case.label}" for case in long.cases(long.sizes(dry=False))]
    for kind in ("window", "CSA", "HCA"):
        assert any(label.startswith(f"sparse_attention {kind} decode, batch 4, 1M, 64 heads") for label in labels)
    assert any(label.startswith("indexer_topk decode, batch 4, 1M, fp8") for label in labels)
    for cache in ("CSA, ratio 4", "HCA, ratio 128", "keys, ratio 4"):
        assert any(label.startswith(f"compress {cache}, decode") for label in labels)
    assert sum("prefill, 1024 tokens" in label for label in labels) == 8


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("dry")
    command = [sys.executable, "-m", "checks.gpu_check", "--dry-run", "--out", str(out), "--budget", "7200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=7200)
    assert (out / "dry-run.json").exists(), done.stderr[-3000:]
    return done, json.loads((out / "dry-run.json").read_text()), (out / "dry-run.md").read_text()


def test_a_dry_run_goes_through_every_part(dry_run):
    done, report, text = dry_run
    parts = {part["name"]: part for part in report["parts"]}
    statuses = {name: part["status"] for name, part in parts.items()}
    assert statuses == {
        "engine": "passed", "long": "passed", "tests": "not run", "width": "passed", "kernels": "passed",
        "peer": "passed",
    }, text  # fmt: skip
    assert done.returncode == 0
    assert re.fullmatch(r"0 passed, 0 failed, [1-9]\d* skipped", parts["tests"]["reason"])
    assert all(part["finished"] for part in parts.values())
    assert done.stdout.rstrip().splitlines()[-1].startswith("The report is in ")


def test_a_dry_runs_engines_are_on_vllms_v2_runner_and_in_graphs(dry_run):
    checks = {check["name"]: check["detail"] for part in dry_run[1]["parts"] for check in part["checks"]}
    # Steps are counted on that runner alone.
    assert "whole graphs" in checks["scheduler, float32, fp32 rows: chunked prefill, graphs"]
    assert "piecewise" in checks["scheduler, float32, fp32 rows: chunked prefill, graphs"]
    assert checks["scheduler, float32, fp32 rows: prefix cache, graphs"].startswith("256 of 300 tokens from the cache")
    assert re.match("[1-9]", checks["scheduler, float32, fp32 rows: preemption, graphs"])
    assert "eager" in checks["decode, batch 2, context 300"]


def test_a_dry_run_measures_nothing(dry_run):
    _, report, text = dry_run
    assert "DRY RUN" in text.splitlines()[0]
    for part in report["parts"]:
        for table in part["tables"]:
            measured = [c for c, name in enumerate(table["head"]) if re.search("ms|µs|tokens/s|%|measured", name)]
            assert all(row[c] in ("", DRY) for row in table["rows"] for c in measured), table["title"]
    assert all(row["us"] is None for name in ("moe", "attention") for row in kernels_data(report)[name]["rows"])


def kernels_data(report: dict) -> dict:
    (part,) = (part for part in report["parts"] if part["name"] == "kernels")
    return part["data"]
