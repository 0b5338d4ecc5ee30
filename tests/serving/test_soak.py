"""benchmarks/soak.py: a short soak on the shared server, long and parallel ones, and what it objects to."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak import GROWTH, Question, Report
from tests.serving.conftest import Servers
from tests.tiny import TOY, TinySpec, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20
# Either of two stages has a layer of each compressed kind, which vLLM needs, and the indexer leaves out nothing.
STAGED = TinySpec(
    "two pipeline stages", {"num_hidden_layers": 5, "compress_ratios": [4, 128, 4, 128, 0, 0], "num_hash_layers": 3}, 0
)


def test_short_soak(servers: Servers, questions: list[Question]) -> None:
    report = asyncio.run(soak.soak(servers.get(), questions, SECONDS, clients=24))
    print(json.dumps(report.as_json(), indent=1))
    assert report.failures == []


def run_script(*arguments: str, seconds: float) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert {"soak", "kill -9 EngineCore", "SIGTERM"} <= result.keys()


@pytest.mark.slow
def test_ten_minutes(tmp_path: Path) -> None:
    run_script("--minutes", "10", "--logs", str(tmp_path), seconds=3600)


@pytest.mark.slow
def test_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    """With a kill -9 of the engine core and of either worker, each followed by a restart."""
    run_script(
        "--minutes", "1", "--tensor-parallel-size", "2", "--prompts", "20", "--logs", str(tmp_path), seconds=3600
    )


@pytest.mark.slow
def test_two_pipeline_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with two tensor-parallel ranks."""
    model = write_checkpoint(tmp_path / "model", STAGED)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((TOY / name).read_bytes())
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,3")
    options = ("--pipeline-parallel-size", "2", "--cache-mib", "9", "--prompts", "20", "--logs", str(tmp_path))
    run_script(str(model), "--minutes", "1", *options, seconds=3600)


def seen(**changes: object) -> Report:
    """A report of a soak in which all went well, but for `changes`."""
    report = Report(counts=Counter(answered=1, aborted=1), preemptions=1, prefix_hit_tokens=256)
    for name, value in changes.items():
        setattr(report, name, value)
    soak.judge(report)
    return report


def test_a_good_report_has_no_failures() -> None:
    assert seen(memory={"EngineCore": {"after warm-up": 5, "at the end": 5 + GROWTH}}).failures == []


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"memory": {"EngineCore": {"after warm-up": 5, "at the end": 6 + GROWTH}}}, "EngineCore grew by 16.0 MiB"),
        ({"blocks_in_use": 0.01}, "1.0% of the KV blocks"),
        ({"preemptions": 0}, "no request was preempted"),
        ({"prefix_hit_tokens": 0}, "no prefix was found in the cache"),
        ({"counts": Counter(answered=1)}, "no request was aborted"),
    ],
)
def test_what_a_report_objects_to(changes: dict[str, object], failure: str) -> None:
    (found,) = seen(**changes).failures
    assert found.startswith(failure)


def test_a_wrong_answer_is_a_failure(servers: Servers, questions: list[Question]) -> None:
    """The references are of another prompt: a soak that compares nothing would not see it."""
    wrong = [Question(questions[0].prompt, tuple(token ^ 1 for token in questions[0].answer))]
    report = Report()
    asyncio.run(soak.load(servers.get(), wrong, 1.0, clients=2, report=report))
    assert report.failures
    assert "and alone" in report.failures[0]
    again = Report()
    asyncio.run(soak.still_the_same(servers.get(), wrong, again, "at last"))
    assert len(again.failures) == 1
    assert again.failures[0].startswith("at last, a prompt of")


def test_prompts_share_beginnings_and_have_many_lengths() -> None:
    prompts = soak.make_prompts(40, seed=1)
    assert prompts == soak.make_prompts(40, seed=1)
    stems = Counter(prompt[: soak.CACHED_STEP] for prompt in prompts if len(prompt) > soak.CACHED_STEP)
    assert sorted(stems.values()) == [4, 12]
    assert len({len(prompt) for prompt in prompts}) > 25
    assert max(map(len, prompts)) <= soak.MAX_PROMPT


@pytest.mark.parametrize("option", ["--minutes", "--clients", "--prompts", "--tensor-parallel-size", "--cache-mib"])
def test_options_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        soak.main([option, "0"])
    assert caught.value.code == 2
    assert f"{option} is 0" in capsys.readouterr().err.replace("0.0", "0")
