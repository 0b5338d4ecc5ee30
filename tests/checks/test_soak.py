"""checks/soak.py: a short soak and the faults on one server, long and parallel ones, and what it reports as failures.

The faults end the server, so they are the last tests of the file.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from checks import soak
from checks.faults import CLIENTS, FAULT_PROMPT, kill_under_load, terminate_under_load
from checks.soak import GROWTH, Length, Load, Report
from testing.client import (
    CACHED_STEP,
    ENVIRONMENT,
    MAX_MODEL_LEN,
    MAX_PROMPT,
    STOP_TIMEOUT,
    Question,
    ask,
    ask_each_alone,
    client_of,
    make_prompts,
    vllm_options,
    wait_for_prompts,
)
from testing.server import FRONT_END, Server, Servers
from testing.tiny import TOY, TinySpec, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# The 24 clients ask three times each: as many requests as an idle machine answers in 20 s.
SHORT = Length(requests=72)
# vLLM needs a layer of each compressed kind in both stages; the indexer leaves out nothing.
STAGED = TinySpec(
    "two pipeline stages", {"num_hidden_layers": 5, "compress_ratios": [4, 128, 4, 128, 0, 0], "num_hash_layers": 3}, 0
)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(TOY, tmp_path_factory.mktemp("servers"), vllm_options(), ENVIRONMENT)
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def questions(servers: Servers) -> list[Question]:
    return asyncio.run(ask_each_alone(servers.get(), make_prompts(20, seed=0), 24))


def test_short_soak(servers: Servers, questions: list[Question]) -> None:
    report = asyncio.run(soak.soak(servers.get(), questions, SHORT, clients=24))
    print(json.dumps(report.as_json(), indent=1))
    assert report.failures == []


def run_script(*arguments: str, seconds: float) -> None:
    command = [sys.executable, "-m", "checks.soak", *arguments]
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


def counted(**changes: int) -> Counter[str]:
    counts = {"answered": 1, "aborted": 1, "with a seed": 1, "with several choices": 1}
    return Counter(counts | changes)


def seen(**changes: object) -> Report:
    """The report of a soak without failures, except for `changes`."""
    report = Report(counts=counted(), preemptions=1, prefix_hit_tokens=256)
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
        ({"counts": counted(aborted=0)}, "no request was aborted"),
        ({"counts": counted() - Counter(["with a seed"])}, "no request with a seed was answered"),
        ({"counts": counted() - Counter(["with several choices"])}, "no request with several choices"),
    ],
)
def test_what_a_report_objects_to(changes: dict[str, object], failure: str) -> None:
    (found,) = seen(**changes).failures
    assert found.startswith(failure)


def test_a_wrong_answer_is_a_failure(servers: Servers, questions: list[Question]) -> None:
    """Answers are compared: wrong references make failures."""
    wrong = [Question(questions[0].prompt, tuple(token ^ 1 for token in questions[0].answer))]
    report = Report()
    asyncio.run(Load(servers.get(), wrong, Length(requests=2), report).run(clients=2))
    assert report.failures
    assert "and alone" in report.failures[0]
    again = Report()
    asyncio.run(soak.still_the_same(servers.get(), wrong, again, "at last"))
    assert len(again.failures) == 1
    assert again.failures[0].startswith("at last, a prompt of")


def test_prompts_share_beginnings_and_have_many_lengths() -> None:
    prompts = make_prompts(40, seed=1)
    assert prompts == make_prompts(40, seed=1)
    stems = Counter(prompt[:CACHED_STEP] for prompt in prompts if len(prompt) > CACHED_STEP)
    assert sorted(stems.values()) == [4, 12]
    assert len({len(prompt) for prompt in prompts}) > 25
    assert max(map(len, prompts)) <= MAX_PROMPT


@pytest.mark.parametrize("option", ["--minutes", "--clients", "--prompts", "--tensor-parallel-size", "--cache-mib"])
def test_options_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        soak.main([option, "0"])
    assert caught.value.code == 2
    assert f"{option} is 0" in capsys.readouterr().err.replace("0.0", "0")


# ---- faults


def test_a_killed_worker_ends_the_server_and_a_restart_serves(servers: Servers, questions: list[Question]) -> None:
    server = servers.get()
    (worker,) = [name for name in server.processes() if name not in (FRONT_END, "EngineCore")]
    ending = asyncio.run(kill_under_load(server, worker))
    assert ending.failures == []
    assert "answered" not in ending.replies
    assert ending.replies.total() == CLIENTS
    # vLLM may give the exit code as -9 or as None.
    assert "Worker proc VllmWorker-0 died unexpectedly" in server.output()
    again = Report()
    asyncio.run(soak.still_the_same(servers.get(), questions[:5], again, "after a restart"))
    assert again.failures == []


def test_sigterm_lets_running_requests_finish(servers: Servers) -> None:
    """With --shutdown-timeout. Every process ends by itself and logs no error."""
    server = servers.get()
    before = len(server.output())
    ending = asyncio.run(terminate_under_load(server))
    farewell = server.output()[before:]
    assert ending.failures == [], farewell
    assert "force killing" not in farewell, farewell
    assert "vllm_deepseek_v4flash" not in farewell, farewell
    # vLLM's front end logs "AsyncLLM output_handler failed", with any model, if it reads from its engine after that has
    # ended.
    errors = [line for line in farewell.splitlines() if "ERROR" in line and "(APIServer" not in line]
    assert errors == [], farewell


@pytest.mark.slow
def test_sigterm_without_a_timeout_ends_when_the_clients_have_gone(tmp_path: Path) -> None:
    """The engine ends at once. The front end waits for its clients, which vLLM 0.32 may leave without an answer."""

    async def run(server: Server) -> int:
        family = server.processes()
        async with client_of(server) as client:
            tokens = MAX_MODEL_LEN - len(FAULT_PROMPT)
            requests = [asyncio.create_task(ask(client, FAULT_PROMPT, tokens)) for _ in range(16)]
            await wait_for_prompts(server, 16 * len(FAULT_PROMPT))
            server.send(signal.SIGTERM)
            while "engine manager stopped" not in server.output():
                await asyncio.sleep(0.1)
            for request in requests:
                request.cancel()
            endings = await asyncio.gather(*requests, return_exceptions=True)
            unexpected = [e for e in endings if not isinstance(e, openai.APIError | asyncio.CancelledError)]
            assert unexpected == []
        return await asyncio.to_thread(server.wait_until_gone, list(family.values()), STOP_TIMEOUT)

    # Room for all 16 requests at once, so that none ends before the signal.
    with Server(TOY, tmp_path / "log.txt", vllm_options(cache_mib=640, stop_seconds=0)) as server:
        server.wait_until_healthy()
        assert asyncio.run(asyncio.wait_for(run(server), STOP_TIMEOUT)) == 0


@pytest.mark.slow
def test_vllms_own_exit_status_says_nothing(tmp_path: Path) -> None:
    """0 after a kill -9, as docs/operations.md warns. When vLLM has fixed that, FailWithEngine can go."""
    options = [option for option in vllm_options() if "iddleware" not in option]
    with Server(TOY, tmp_path / "log.txt", tuple(options)) as server:
        server.wait_until_healthy()
        assert asyncio.run(kill_under_load(server, "EngineCore")).status == 0
