"""The command line: parts that fail, hang, crash or do not fit into the budget, the reports and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from checks.gpu_check import cli, environment, parts, process
from checks.gpu_check.parts import Part
from checks.gpu_check.report import CheckReport, table
from checks.gpu_check.results import DRY, Check, FailedError, NotRunError, PartResult, Recorder, Table

# `run_part.py` imports a part's module by its name; in this script a function of PARTS stands in for the module.
RUN = f"""
import importlib, types
from checks.gpu_check import run_part
from {__name__} import PARTS
real = importlib.import_module
def find(name, package=None):
    function = PARTS.get(name.removeprefix("."))
    return types.SimpleNamespace(run=function) if function else real(name, package)
importlib.import_module = find
run_part.main()
"""


def good(recorder: Recorder) -> None:
    recorder.attempt("one", lambda: "found it")
    table = recorder.table("Times", ["what", "ms"])
    table.rows.append(["a step", recorder.figure(12.345, ".2f")])


def bad(recorder: Recorder) -> None:
    def wrong() -> str:
        raise FailedError("3 is not 4")

    recorder.attempt("wrong", wrong)
    recorder.attempt("right", lambda: "still tried")


def hanging(recorder: Recorder) -> None:
    recorder.attempt("first", lambda: "")
    # A grandchild, as vLLM's engines are: it must not outlive the part.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["GRANDCHILD"]).write_text(str(child.pid))

    def forever() -> str:
        time.sleep(600)
        return ""

    recorder.attempt("forever", forever)


def crashing(recorder: Recorder) -> None:
    recorder.attempt("first", lambda: "")
    print("about to fall")
    raise RuntimeError("fell over")


def dying(recorder: Recorder) -> None:
    recorder.attempt("abort", os.abort)


def impossible(recorder: Recorder) -> None:
    raise NotRunError("no such kernels here")


PARTS = {part.__name__: part for part in (good, bad, hanging, crashing, dying, impossible)}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Parts are those of PARTS; returns the report's directory."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    run_group = process.run_group

    def run(command: list[str], *rest: Any) -> int | None:
        assert command[1:3] == ["-m", "checks.gpu_check.run_part"]
        return run_group([command[0], str(script), *command[3:]], *rest)

    monkeypatch.setattr(process, "run_group", run)
    monkeypatch.setattr(process, "GRACE", 1.0)
    monkeypatch.setattr(cli, "GRACE", 1.0)
    return tmp_path / "out"


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is known without a process that imports torch."""
    found = PartResult("describe", data={"usable": True, "device": {"device": "made up"}})
    monkeypatch.setattr(cli, "describe", lambda *_, **__: found)


def check(monkeypatch: pytest.MonkeyPatch, out: Path, *chosen: Part, arguments: tuple[str, ...] = ()):
    """The exit status and the JSON report of a dry run of these parts."""
    monkeypatch.setattr(cli, "PARTS", chosen)
    status = cli.main(["--dry-run", "--out", str(out), *arguments])
    return status, json.loads((out / "dry-run.json").read_text())


def part(name: str, optional: bool = False) -> Part:
    return Part(name, f"what {name} shows", 5, 1, optional)


def test_one_part_that_fails_hides_no_other(monkeypatch, made_up, described, capsys):
    status, report = check(monkeypatch, made_up, part("bad"), part("crashing"), part("dying"), part("good"))
    assert status == 1
    assert report["failed"] == ["bad", "crashing", "dying"]
    bad, crashing, dying, good = report["parts"]
    assert (good["status"], good["finished"], good["log"]) == ("passed", True, "")
    assert [c["status"] for c in bad["checks"]] == ["failed", "passed"]
    assert bad["checks"][0]["detail"] == "3 is not 4"
    assert bad["reason"] == "1 of 2 failed: wrong"
    assert crashing["reason"] == "ended with status 1 without a complete report"
    assert crashing["checks"][0]["name"] == "first"
    assert crashing["log"].endswith("RuntimeError: fell over")
    assert dying["reason"] == "ended by signal 6 (SIGABRT) during 'abort'"
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("The report is in ")
    summary = printed[printed.index("GPU check: DRY RUN on a CPU, nothing is measured") :]
    assert [line.split("|")[1].strip() for line in summary if line.startswith("|")][2:] == [
        "bad", "crashing", "dying", "good",
    ]  # fmt: skip


def test_a_part_that_hangs_is_killed_with_all_that_it_started(monkeypatch, made_up, described, tmp_path):
    grandchild = tmp_path / "pid"
    monkeypatch.setenv("GRANDCHILD", str(grandchild))
    monkeypatch.setattr(cli, "seconds_for", lambda part, rest, left: 6.0 if part.name == "hanging" else left)

    class Process(subprocess.Popen):
        """The time of the hanging part is over when it hangs, however long its start takes."""

        def wait(self, timeout=None):
            if timeout == 7.0:
                while not hangs(made_up) and self.poll() is None:
                    time.sleep(0.1)
                timeout = 0.0
            return super().wait(timeout)

    monkeypatch.setattr(process.subprocess, "Popen", Process)
    status, report = check(monkeypatch, made_up, part("hanging"), part("good"))
    hanging, good = report["parts"]
    assert status == 1
    assert hanging["reason"] == "killed after its limit of 7 s during 'forever'"
    assert [c["name"] for c in hanging["checks"]] == ["first"]
    assert good["status"] == "passed"
    deadline = time.monotonic() + 600
    while runs(int(grandchild.read_text())):
        assert time.monotonic() < deadline, "the part's own child lives on"
        time.sleep(0.1)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def hangs(out: Path) -> bool:
    result = PartResult.read(out / "hanging.part.json", "hanging")
    return result.running == "forever"


def test_what_cannot_run_is_no_failure(monkeypatch, made_up, described):
    status, report = check(monkeypatch, made_up, part("impossible"))
    assert status == 0
    (impossible,) = report["parts"]
    assert (impossible["status"], impossible["reason"]) == ("not run", "no such kernels here")


@pytest.mark.parametrize(("optional", "status"), [(True, "not run"), (False, "failed")])
def test_what_goes_wrong_in_a_part_of_others_is_no_failure(optional, status):
    crashed = PartResult("peer", running="engine")
    process.judge(crashed, 1, optional)
    assert crashed.status == status
    assert crashed.reason == "ended with status 1 without a complete report during 'engine'"
    wrong = PartResult("peer", finished=True, checks=[Check("a", "failed"), Check("b", "passed")])
    process.judge(wrong, 0, optional)
    assert (wrong.status, wrong.reason) == (status, "1 of 2 failed: a")


def test_in_a_dry_run_every_part_is_ours(monkeypatch, made_up, described):
    status, report = check(monkeypatch, made_up, part("crashing", optional=True))
    assert status == 1
    assert report["failed"] == ["crashing"]


def test_what_no_longer_fits_is_not_run(monkeypatch, made_up, described):
    monkeypatch.setattr(cli, "run_part", lambda *_: pytest.fail("it was started"))
    status, report = check(monkeypatch, made_up, part("good"), part("bad"), arguments=("--budget", "0"))
    assert status == 0
    assert [p["status"] for p in report["parts"]] == ["not run", "not run"]
    assert report["parts"][0]["reason"] == "0 s of the budget are left, it needs at least 0"


def test_cases_that_no_longer_fit_are_not_run(tmp_path):
    now = [100.0]
    recorder = Recorder("part", tmp_path / "part.json", 30.0, dry=False, clock=lambda: now[0])
    assert recorder.attempt("short", lambda: "", needs=30.0)
    now[0] += 10
    assert not recorder.attempt("long", lambda: pytest.fail("started"), needs=25.0)
    result = PartResult.read(tmp_path / "part.json", "part")
    assert [c.status for c in result.checks] == ["passed", "not run"]
    assert result.checks[1].detail == "20 of 30 s are left, it may take 25"
    assert not result.finished


def test_shares_of_the_budget():
    first, *rest = parts.PARTS
    everything = sum(p.share for p in parts.PARTS)
    assert parts.seconds_for(first, rest, 480) == pytest.approx(480 * first.share / everything)
    assert parts.seconds_for(parts.PARTS[-1], [], 100) == 100
    # What shows that the numbers are right comes before what shows the speed.
    assert parts.NAMES[:3] == ("engine", "long", "tests")
    assert set(parts.NAMES) == {"tests", "engine", "width", "long", "kernels", "peer"}
    assert [p.name for p in parts.PARTS if p.optional] == ["peer"]


def test_only_the_parts_that_are_named(monkeypatch, made_up, described):
    status, report = check(monkeypatch, made_up, part("good"), part("bad"), arguments=("--only", "good"))
    assert status == 0
    assert [p["name"] for p in report["parts"]] == ["good"]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--only", "engine", "speed"])
    assert error.value.code == 2
    assert "--only speed: there is no such part. Use: engine" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    found = PartResult("describe", data={"usable": False, "device": {"device": "none: torch sees no CUDA device"}})
    monkeypatch.setattr(cli, "describe", lambda *_: found)
    assert cli.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch sees no CUDA device. --dry-run needs none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_is_there_while_parts_still_run(monkeypatch, made_up, described):
    seen = []

    def run(part: Part, out: Path, *_: object) -> PartResult:
        written = json.loads((out / "dry-run.json").read_text())["parts"]
        seen.append([(p["name"], p["status"], p["reason"]) for p in written])
        return PartResult(part.name, "passed", checks=[Check("c", "passed")])

    monkeypatch.setattr(cli, "run_part", run)
    check(monkeypatch, made_up, part("good"), part("bad"))
    unreached = "not reached"
    assert seen == [
        [("good", "not run", unreached), ("bad", "not run", unreached)],
        [("good", "passed", ""), ("bad", "not run", unreached)],
    ]


def test_a_dry_run_never_looks_like_a_measurement(monkeypatch, made_up):
    _, report = check(monkeypatch, made_up, part("good"), arguments=("--commit", "abc"))
    text = (made_up / "dry-run.md").read_text()
    assert text.startswith("# GPU check: DRY RUN on a CPU, nothing is measured\n")
    assert "- device: cpu, dry run: the figures of no GPU" in text
    assert "- commit: abc" in text
    assert report["dry"] is True
    assert report["parts"][0]["tables"][0]["rows"] == [["a step", DRY]]
    assert "12.3" not in text
    assert not (made_up / "gpu-check.md").exists()
    assert cli.default_directory({"device": "cpu"}, dry=True).parent != cli.RESULTS


def test_a_measured_report_is_named_after_its_device():
    where = cli.default_directory({"device": "NVIDIA H100 80GB HBM3, sm_90, 132 SMs"}, dry=False)
    assert where.parent == environment.ROOT / "benchmarks" / "results"
    assert where.name[10:] == "-nvidia-h100-80gb-hbm3"


def test_the_report_in_markdown(tmp_path):
    done = PartResult(
        "long", "failed", "1 of 2 failed: a", 12.0, 40.0,
        checks=[Check("a", "failed", "x | y", 3.0), Check("b", "passed")],
        tables=[Table("Times", ["what", "ms"], [["a step", "1.5"]], note="By the clock.")], log="Traceback",
    )  # fmt: skip
    report = CheckReport(False, {"device": "H100", "commit": "abc"}, ["--only", "long"], 480.0, [done], 13.0)
    json_path, markdown = report.write(tmp_path)
    assert (json_path.name, markdown.name) == ("gpu-check.json", "gpu-check.md")
    text = markdown.read_text()
    assert text.startswith("# GPU check\n")
    for line in (
        "- device: H100", "- command: `python -m checks.gpu_check --only long`", "- 13 s of a budget of 480",
        "| long | failed | 1 passed, 1 failed | 12 s | 1 of 2 failed: a |", "x \\| y", "### Times", "By the clock.",
        "```\nTraceback\n```",
    ):  # fmt: skip
        assert line in text
    assert json.loads(json_path.read_text())["failed"] == ["long"]
    assert table(["a", "bb"], [["1", "2"]]) == ["| a   | bb  |", "| --- | --- |", "| 1   | 2   |"]


def test_the_plugin_is_found_without_an_installation(tmp_path):
    """In a process that has the repository on its path alone, as on a GPU machine, and in those that vLLM starts."""
    metadata = environment.write_metadata(tmp_path / "metadata")
    variables = environment.part_environment(metadata, dry=False)
    # Of several installations of one name, Python takes the first on the path: ours, though .venv has another.
    code = """
from importlib import metadata
print(next(iter(metadata.distributions(name="vllm-deepseek-v4flash"))).locate_file("."))
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models.registry import ModelRegistry
print(ModelRegistry.models["DeepseekV4ForCausalLM"].module_name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=1200,
        check=True,
    )  # fmt: skip
    found, module = done.stdout.splitlines()[-2:]
    assert Path(found) == metadata
    assert module == "vllm_deepseek_v4flash.integration.registered_model"
    # vLLM inspects model classes in a process of its own, which gets these variables.
    assert variables["PYTHONPATH"].split(os.pathsep)[:2] == [str(metadata), str(environment.ROOT)]
    assert variables["TRITON_INTERPRET"] == "0"
