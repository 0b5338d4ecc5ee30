"""examples/offline_batch.py: a run that is killed and one that continues it, and every file that it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from testing.batch import SCRIPT, line

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "examples" / "toy"
MODES = ("none", "high", "max")
# Room for 3 running requests: a run that is killed early has answered some of them and not others.
LLM = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 3, "kv_cache_memory_bytes": 256 << 20}
TIMEOUT = 1200  # seconds; a run takes 20 on idle cores
# Runs the script, which stops when its output has so many lines.
HELD = """
import os, runpy, signal, sys, types
script, count, *arguments = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
example = types.SimpleNamespace(**runpy.run_path(script, run_name="offline_batch"))
add = example.Results.add

def add_and_stop(results, rows):
    add(results, rows)
    if results.path.read_bytes().count(b"\\n") >= int(count):
        signal.pause()

example.Results.add = add_and_stop
sys.exit(example.main(arguments))
"""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(row) for row in path.read_bytes().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows), "a request was answered twice"
    return {row["custom_id"]: row for row in rows}


def arguments(requests: Path, results: Path, **llm: Any) -> list[str]:
    return [str(requests), str(results), "--llm", json.dumps(LLM | llm)]


def run(requests: Path, results: Path, **llm: Any) -> subprocess.CompletedProcess[str]:
    """Run the script to its end; `stdout` includes the standard error."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments(requests, results, **llm)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=TIMEOUT,
    )  # fmt: skip


def kill_when_some_are_answered(requests: Path, results: Path, count: int, **llm: Any) -> int:
    """kill -9 when `results` has `count` lines; returns how many processes it had started, all of which are gone."""
    log = results.with_suffix(".log")
    command = [sys.executable, "-c", HELD, str(SCRIPT), str(count), *arguments(requests, results, **llm)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + TIMEOUT
        while not results.exists() or results.read_bytes().count(b"\n") < count:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=TIMEOUT)
    for left in alive:
        left.kill()
    assert alive == [], "they keep the memory that the next run needs"
    return len(family)


@pytest.fixture(scope="module")
def asked() -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Lines for the toy's questions in three modes, two that cannot be answered, one more, and eval.jsonl's rows."""
    rows = [json.loads(row) for row in (TOY / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["task"] == "reverse"][:12]
    lines = [line("too long", "7" * 3000), line("no such mode", reasoning_effort="extreme")]
    lines.append(line("budget", temperature=0, max_tokens=64, thinking_token_budget=2))
    for number, row in enumerate(rows):
        mode = ("high", "max")[number % 4 == 3] if row["thinking"] else "none"
        lines.append(line(f"{number} {mode}", row["question"], reasoning_effort=mode, temperature=0, max_tokens=64))
    return lines, {f"{number}": row for number, row in enumerate(rows)}


def check_results(results: Path, asked: tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]) -> None:
    lines, rows = asked
    found = read(results)
    assert found.keys() == {row["custom_id"] for row in lines}
    assert "context length" in found.pop("too long")["error"]["message"]
    assert "'extreme'" in found.pop("no such mode")["error"]["message"]
    (hasty,) = found.pop("budget")["response"]["body"]["choices"]
    assert len(hasty["message"]["reasoning"]) == 2, "a token is a byte"
    assert hasty["message"]["content"]
    for custom_id, result in found.items():
        number, mode = custom_id.split()
        body = result["response"]["body"]
        (choice,) = body["choices"]
        row = rows[number]
        assert result["error"] is None
        assert ("reasoning" in choice["message"]) == (mode != "none")
        if mode != "max":  # which has another prompt
            assert body["usage"]["completion_tokens"] == len(row["greedy_token_ids"])
            if row["greedy_correct"]:
                assert choice["message"]["content"].strip() == row["answer"]
                assert choice["finish_reason"] == "stop"
    assert {custom_id.split()[1] for custom_id in found} == set(MODES)


def test_a_killed_run_goes_on_and_loses_nothing(example: Any, tmp_path: Path, asked: Any) -> None:
    requests, results = write(tmp_path / "in.jsonl", asked[0]), tmp_path / "out.jsonl"
    kill_when_some_are_answered(requests, results, 4)
    before = results.read_text(encoding="utf-8")
    done = before.splitlines()
    assert 4 <= len(done) < len(asked[0]), "it was killed while requests were running"
    # What a kill during a write leaves.
    missing = next(request for request in example.read_requests(requests) if request.custom_id not in read(results))
    with results.open("a", encoding="utf-8") as stream:
        stream.write(f'{{"id": "{missing.id}", "custom_id": "{missing.custom_id}", "resp')
    again = run(requests, results)
    assert again.returncode == 1, again.stdout
    assert again.stdout.endswith(f"{len(asked[0]) - 2} answered, 2 refused: {results}\n")
    assert f"{len(done)} of {len(asked[0])} requests have their results" in again.stdout
    assert results.read_text(encoding="utf-8").startswith(before), "a finished answer was written again"
    check_results(results, asked)


def test_a_complete_run_starts_nothing(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its exit status still says that a request was refused."""
    requests, path = write(tmp_path / "in.jsonl", [line("a"), line("b")]), tmp_path / "out.jsonl"
    results = example.Results(path)
    rows = [row_of(request) for request in example.read_requests(requests)]
    results.add([rows[0], rows[1] | {"response": None, "error": {"code": "invalid_request", "message": "no"}}])
    results.close()
    assert example.main([str(requests), str(path)]) == 1
    assert capsys.readouterr().out == f"2 of 2 requests have their results in {path}\n1 answered, 1 refused: {path}\n"


@pytest.mark.slow
def test_the_workers_of_a_killed_run_end_by_themselves(tmp_path: Path, asked: Any) -> None:
    requests, results = write(tmp_path / "in.jsonl", asked[0]), tmp_path / "out.jsonl"
    assert kill_when_some_are_answered(requests, results, 4, tensor_parallel_size=2) >= 2
    again = run(requests, results, tensor_parallel_size=2)
    assert again.returncode == 1, again.stdout
    check_results(results, asked)


REFUSED: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "line 2: "),
    "not an object": ("[]", "line 2: the line is list"),
    "no custom_id": (json.dumps({"body": {}}), "line 2: custom_id is None"),
    "an empty custom_id": (json.dumps(line("")), "line 2: custom_id is ''"),
    "a custom_id again": (json.dumps(line("first")), "line 2: custom_id 'first' was there before"),
    "no body": (json.dumps({"custom_id": "a"}), "line 2: body must be an object"),
    "no messages": (json.dumps({"custom_id": "a", "body": {"messages": []}}), "line 2: body must be an object"),
    "another endpoint": (json.dumps(line("a") | {"url": "/v1/embeddings"}), "line 2: url is '/v1/embeddings'"),
    "an unknown parameter": (json.dumps(line("a", top_j=1)), "line 2: body.top_j would be ignored"),
    "an unknown key": (json.dumps(line("a") | {"prio": 1}), "line 2: prio would be ignored"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_input(example: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = REFUSED[name]
    requests = tmp_path / "in.jsonl"
    requests.write_text(json.dumps(line("first")) + "\n" + text + "\n", encoding="utf-8")
    assert example.main([str(requests), str(tmp_path / "out.jsonl")]) == 2
    assert f"error: {requests}, {message}" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_characters_that_end_lines_elsewhere_are_text(example: Any, tmp_path: Path) -> None:
    row = line("a", "x\u2028y\x85z")
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert [request.body for request in example.read_requests(path)] == [row["body"]]


def test_input_that_cannot_be_read(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([str(tmp_path / "none"), str(tmp_path / "out.jsonl")]) == 2
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert example.main([str(tmp_path / "bytes"), str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err.count("cannot be read") == 2


@pytest.fixture
def results(example: Any, tmp_path: Path) -> Iterator[Any]:
    results = example.Results(tmp_path / "out.jsonl")
    yield results
    results.close()


def row_of(request: Any, text: str = "50") -> dict[str, Any]:
    return {"id": request.id, "custom_id": request.custom_id, "response": text, "error": None}


def test_results_come_back_and_a_torn_line_is_cut_off(example: Any, tmp_path: Path) -> None:
    path, request, other = tmp_path / "out.jsonl", example.Request("a", {"messages": [1]}), example.Request("b", {})
    first = example.Results(path)
    first.add([row_of(request, "ö\u2028")])
    first.close()
    whole, torn = path.read_bytes(), json.dumps(row_of(other)).encode()
    for length in range(len(torn) + 1):
        for zeros in (b"", bytes(4096)):  # where the data were to be at a power cut
            path.write_bytes(whole + torn[:length] + zeros)
            again = example.Results(path)
            again.check([request, other])
            assert (again.ids, again.refused) == ({"a": request.id}, 0)
            again.close()
            assert path.read_bytes() == whole


def test_a_result_is_on_the_disk_before_add_returns(
    example: Any, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(results.path.read_bytes()))
    results.add([row_of(example.Request("a", {})), row_of(example.Request("b", {}))])
    assert len(synced) == 1
    assert synced[0] == results.path.read_bytes()
    assert synced[0].count(b"\n") == 2


def test_a_short_write_is_continued(example: Any, results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_some = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write_some(descriptor, data[:5]))
    request = example.Request("a", {})
    results.add([row_of(request)])
    assert json.loads(results.path.read_bytes()) == row_of(request)


def test_two_runs_cannot_write_one_file(example: Any, results: Any) -> None:
    with pytest.raises(example.BatchError, match="another run is writing"):
        example.Results(results.path)


@pytest.mark.parametrize(
    "text", ['{"custom_id": "a"}\n', "[]\n", "\n", "hello\n", '{"a": 1}\n{"id": "x", "custom_id": "b"}\n']
)
def test_another_file_is_not_written_to(example: Any, tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(example.BatchError, match="line 1 is no result of this program"):
        example.Results(path)
    assert path.read_text() == text


def test_results_of_other_requests_are_refused(example: Any, results: Any) -> None:
    request = example.Request("a", {"messages": [1], "seed": 1})
    results.add([row_of(request)])
    results.check([request, example.Request("b", {})])
    with pytest.raises(example.BatchError, match="'a', whose body was another one"):
        results.check([example.Request("a", {"messages": [1], "seed": 2})])
    with pytest.raises(example.BatchError, match="'a', which the input does not have"):
        results.check([example.Request("b", {})])


@pytest.mark.parametrize(
    ("prompt", "text", "message"),
    [
        ([0, 7], "50", {"content": "50"}),
        ([0, 5], "14 36</think>50", {"reasoning": "14 36", "content": "50"}),
        ([0, 5], "14 36", {"reasoning": "14 36", "content": None}),
    ],
)
def test_thoughts_are_apart_from_the_answer(example: Any, prompt: list[int], text: str, message: Any) -> None:
    completion = SimpleNamespace(text=text, token_ids=[1, 2, 3], finish_reason="stop")
    output = SimpleNamespace(prompt_token_ids=prompt, outputs=[completion])
    tokenizer = SimpleNamespace(convert_tokens_to_ids={"<think>": 5}.__getitem__)
    body = example.answer(example.Request("a", {}), output, tokenizer, "toy")["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", **message}
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_llm_must_be_a_json_object(example: Any, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        example.main(["in", "out", "--llm", text])
    assert caught.value.code == 2
    assert "--llm" in capsys.readouterr().err
