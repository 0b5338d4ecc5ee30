"""examples/offline_batch.py with a fake engine: whatever fails ends one request or the run, and loses no answer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from testing.batch import line

SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "thinking_token_budget",
)  # fmt: skip


class FakeSampling(SimpleNamespace):
    pass


class FakeServerError(Exception):
    """vLLM's VLLMServerError."""


def fake_vllm(**attributes: Any) -> dict[str, ModuleType]:
    """What the example imports of vLLM, whose own import takes ten seconds."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.exceptions", "vllm.sampling_params")}
    vars(modules["vllm"]).update(attributes)
    vars(modules["vllm.exceptions"])["VLLMServerError"] = FakeServerError
    vars(modules["vllm.sampling_params"])["RequestOutputKind"] = SimpleNamespace(FINAL_ONLY=2)
    return modules


class FakeEngine:
    """vLLM's engine and tokenizer; a step finishes the oldest request with the answer 50.

    `prompts` and `steps` hold what to raise for a message and at the n-th step, `ends` the n-th step's finish reason.
    """

    def __init__(self) -> None:
        self.prompts: dict[str, Exception] = {}
        self.steps: dict[int, Exception] = {}
        self.ends: dict[int, str] = {}
        self.llm_engine = self.renderer = self
        self.step_number = 0
        self.ids: list[str] = []

    def get_tokenizer(self) -> Any:
        return self

    def get_default_sampling_params(self) -> Any:
        return FakeSampling(**dict.fromkeys(SAMPLING))

    def convert_tokens_to_ids(self, token: str) -> int:
        return 5

    def apply_chat_template(self, messages: list[Any], **options: Any) -> list[int]:
        if (error := self.prompts.get(messages[0]["content"])) is not None:
            raise error
        return [0, 7]

    def render_cmpl(self, prompts: list[Any]) -> list[Any]:
        return prompts

    def add_request(self, request_id: str, prompt: Any, sampling: Any) -> None:
        request_id.encode("ascii")
        self.ids.append(request_id)

    def step(self) -> list[Any]:
        self.step_number += 1
        if (error := self.steps.get(self.step_number)) is not None:
            raise error
        reason = self.ends.get(self.step_number, "stop")
        completion = SimpleNamespace(text="50", token_ids=[1], finish_reason=reason)
        output = {"request_id": self.ids.pop(0), "finished": True, "prompt_token_ids": [0, 7], "outputs": [completion]}
        return [SimpleNamespace(**output)]


class Batch:
    """A folder with an input of requests a, b and c, and an engine that each run starts anew."""

    def __init__(self, example: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.example, self.engine = example, FakeEngine()
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.ask(line("a"), line("b"), line("c"))
        for name, module in fake_vllm(LLM=lambda **arguments: self.engine).items():
            monkeypatch.setitem(sys.modules, name, module)
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):  # which the example sets
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    def ask(self, *rows: dict[str, Any]) -> None:
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self) -> int:
        return self.example.main([str(self.input), str(self.output)])

    def found(self) -> dict[str, dict[str, Any]]:
        content = self.output.read_bytes()
        assert content.endswith(b"\n") or not content, "a line is torn"
        rows = [json.loads(row) for row in content.splitlines()]
        assert len({row["custom_id"] for row in rows}) == len(rows), "a request was answered twice"
        return {row["custom_id"]: row for row in rows}

    def check_that_it_goes_on(self, before: dict[str, Any], status: int = 0) -> None:
        """A run without faults answers the rest, and keeps what was there."""
        assert self.found() == before
        content = self.output.read_bytes()
        self.engine = FakeEngine()
        assert self.run() == status
        assert self.output.read_bytes().startswith(content)
        assert self.found().keys() == {"a", "b", "c"}
        assert self.engine.step_number == 3 - len(before)


@pytest.fixture
def batch(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    return Batch(example, tmp_path, monkeypatch)


def one_error(capsys: pytest.CaptureFixture[str], text: str) -> None:
    (error,) = [row for row in capsys.readouterr().err.splitlines() if "request/s" not in row and row.strip()]
    assert error.startswith("error: ")
    assert text in error


OPENAI = '{"id": "batch_req_123", "custom_id": "a", "response": {}, "error": null}'
# `{a}` is the result of request a.
FOREIGN: dict[str, str | bytes] = {
    "a text": "hello",
    "two lines": "hello\nworld",
    "a request": json.dumps(line("a")),
    "a brace": "{",
    "the start of any result": '{"id": "batch_req_',
    "zeros": bytes(4096),
    "bytes": b"\xff\xfe\0",
    "a deep line": "[" * 100_000 + "\n",
    "a deep text": "[" * 100_000,
    "OpenAI's results": OPENAI + "\n",
    "OpenAI's last result": OPENAI,
    "a foreign end": "{a}\nhello",
    "the end of another request": '{a}\n{"id": "batch_req_0", "custom_id": "b',
    "the same result again": "{a}\n{a}\n",
    "the start of the same result again": "{a}\n{a}",
    "a number for an id": '{"id": "batch_req_0", "custom_id": 5, "error": null}\n',
    "a list for an id": '{"id": "batch_req_0", "custom_id": [], "error": null}\n',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_file_is_only_read(example: Any, batch: Batch, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = FOREIGN[name]
    if isinstance(content, str):
        request = example.Request("a", line("a")["body"])
        row = {"id": request.id, "custom_id": "a", "response": None, "error": None}
        content = content.replace("{a}", json.dumps(row)).encode()
    batch.output.write_bytes(content)
    os.utime(batch.output, (0, 0))
    assert batch.run() == 2
    one_error(capsys, "give another output file")
    assert batch.output.read_bytes() == content
    assert batch.output.stat().st_mtime_ns == 0
    assert batch.engine.step_number == 0
    with batch.output.open("rb") as stream:  # no lock is left
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("link", [Path.hardlink_to, Path.symlink_to, None])
def test_the_input_is_no_output(batch: Batch, link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    batch.input.write_text(text := json.dumps(line("a")))
    if link is None:
        batch.output = batch.input
    else:
        link(batch.output, batch.input)
    assert batch.run() == 2
    one_error(capsys, "is the input")
    assert batch.input.read_text() == text


def test_only_regular_files_are_written(batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/full")):
        batch.output = path
        assert batch.run() == 2
        one_error(capsys, f"{path} is no regular file")


@pytest.mark.parametrize(
    ("module", "name", "code"),
    [
        (os, "open", errno.EACCES),
        (os, "open", errno.EROFS),
        (fcntl, "flock", errno.ENOLCK),
        (fcntl, "flock", errno.EWOULDBLOCK),
        (os, "ftruncate", errno.EPERM),
        (os, "fsync", errno.EIO),
        (Path, "exists", errno.ENAMETOOLONG),
    ],
)
def test_a_file_that_cannot_be_used(
    batch: Batch, module: Any, name: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    torn = json.dumps(batch_row(batch))[:-1]
    batch.output.write_text(torn)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        assert batch.run() == 2
    one_error(capsys, str(batch.output))
    assert batch.output.read_text() == torn
    assert batch.run() == 0


def test_a_file_system_that_does_not_sync_directories(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "no such operation")

    monkeypatch.setattr(os, "fsync", fail)
    example.Results(tmp_path / "out.jsonl").close()


@pytest.mark.parametrize("room", range(0, 700, 50))
def test_a_full_disk(
    batch: Batch, room: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has room for some bytes of the results."""
    write = os.write

    def write_what_fits(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[:room])
        room -= written
        return written

    whole = room // (len(json.dumps(batch_row(batch))) + 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_what_fits)
        assert batch.run() == 2
    one_error(capsys, f"{batch.output} cannot be written: [Errno {errno.ENOSPC}]")
    assert len(batch.found()) == whole
    batch.check_that_it_goes_on(batch.found())


def batch_row(batch: Batch) -> dict[str, Any]:
    """The result of request a, as long as those of b and c."""
    request = batch.example.Request("a", line("a")["body"])
    output = {"prompt_token_ids": [0, 7], "outputs": [SimpleNamespace(text="50", token_ids=[1], finish_reason="stop")]}
    return batch.example.answer(request, SimpleNamespace(**output), FakeEngine(), "toy")


def test_dev_full(example: Any, tmp_path: Path) -> None:
    results = example.Results(tmp_path / "out.jsonl")
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), results._file)
        results.path = Path("/dev/full")
    with pytest.raises(example.BatchError, match=r"No space left on device. The results in it are whole"):
        results.add([{"id": "x", "custom_id": "a", "error": None}])
    results.close()
    assert results.ids == {}


@pytest.mark.parametrize("replaced", [False, True])
def test_an_output_that_is_taken_away(batch: Batch, replaced: bool, capsys: pytest.CaptureFixture[str]) -> None:
    step = batch.engine.step

    def step_and_remove() -> list[Any]:
        batch.output.unlink()
        if replaced:
            batch.output.write_text("hello")
        return step()

    batch.engine.step = step_and_remove  # type: ignore[method-assign]
    assert batch.run() == 2
    one_error(capsys, "replaced" if replaced else "No such file")
    assert batch.engine.step_number == 1


def test_characters_that_utf8_does_not_have(batch: Batch) -> None:
    batch.ask(line("\ud800"), line("ö\0\n" * 1000), line("c", "\udfff"))
    assert batch.run() == 1
    found, content = batch.found(), batch.output.read_bytes()
    assert found.keys() == {"\ud800", "ö\0\n" * 1000, "c"}
    assert "surrogates not allowed" in found["c"]["error"]["message"]
    assert batch.run() == 1
    assert batch.output.read_bytes() == content


def test_a_torn_line_of_an_id_that_utf8_does_not_have(batch: Batch) -> None:
    batch.ask(line("\ud800"))
    assert batch.run() == 0
    content = batch.output.read_bytes()
    batch.output.write_bytes(content[:-10])
    assert batch.run() == 0
    assert batch.output.read_bytes() == content


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such mode"), "no such mode"),
        (KeyError("role"), "KeyError: 'role'"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (AttributeError("no get"), "AttributeError: no get"),
        (OverflowError("too large"), "OverflowError: too large"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_a_request_that_cannot_be_prepared(batch: Batch, error: Exception, message: str) -> None:
    batch.engine.prompts["bad"] = error
    batch.ask(line("a"), line("b", "bad"), line("c"))
    assert batch.run() == 1
    found = batch.found()
    assert found["b"]["error"] == {"code": "invalid_request", "message": message}
    assert found["b"]["response"] is None
    assert found["a"]["error"] is found["c"]["error"] is None


@pytest.mark.parametrize("error", [MemoryError("full"), OSError("gone"), FakeServerError("dead")])
def test_a_machine_that_cannot_prepare_a_request(
    batch: Batch, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no fault of the request, which must not be refused for ever."""
    batch.engine.prompts["bad"] = error
    batch.ask(line("a"), line("b", "bad"), line("c"))
    assert batch.run() == 2
    one_error(capsys, f"('b'): {type(error).__name__}: {error}")
    batch.check_that_it_goes_on({})


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_engine_that_fails(batch: Batch, failing: int, capsys: pytest.CaptureFixture[str]) -> None:
    batch.engine.steps[failing] = TypeError("manual_seed\n expects int")
    assert batch.run() == 2
    left = ["a", "b", "c"][failing - 1 :]
    one_error(capsys, f"with {len(left)} requests in it ({', '.join(map(repr, left))}): TypeError: manual_seed expects")
    assert batch.found().keys() == {"a", "b", "c"} - set(left)
    batch.check_that_it_goes_on(batch.found())


def test_an_engine_that_fails_keeps_refusals(batch: Batch) -> None:
    batch.engine.prompts["bad"], batch.engine.steps[1] = ValueError("no such mode"), RuntimeError("out of memory")
    batch.ask(line("a"), line("b", "bad"), line("c"))
    assert batch.run() == 2
    assert batch.found().keys() == {"b"}


def test_the_traceback_of_a_failing_engine(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    batch.engine.steps[1] = TypeError("manual_seed")
    assert batch.run() == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: the engine failed")


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_request_that_the_engine_gives_up(batch: Batch, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch.engine.ends[2] = reason
    assert batch.run() == 2
    one_error(capsys, "gave up 1 requests: the same command tries them again")
    assert batch.found().keys() == {"a", "c"}
    batch.check_that_it_goes_on(batch.found())


def test_an_engine_that_does_not_start(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**arguments: Any) -> None:
        raise RuntimeError("no memory for\n the cache")

    for attributes in ({"LLM": fail}, {}):
        monkeypatch.setitem(sys.modules, "vllm", fake_vllm(**attributes)["vllm"])
        assert batch.run() == 2
        one_error(
            capsys, "the engine did not start: " + ("RuntimeError: no memory for the cache" if attributes else "")
        )
    assert batch.output.read_bytes() == b""


@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_messages_that_cannot_be_written(
    batch: Batch, streams: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        for stream in streams:
            patch.setattr(sys, stream, open("/dev/full", "w", buffering=1))  # noqa: SIM115
        assert batch.run() == 2
    if streams == ("stdout",):
        one_error(capsys, f"No space left on device. {batch.output} has the finished results")
    batch.check_that_it_goes_on(batch.found())


def test_a_name_that_is_no_text(batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch.output = tmp_path / os.fsdecode(b"\xff.jsonl")
    assert batch.run() == 0
    assert capsys.readouterr().out.endswith("\\udcff.jsonl\n")


DEEP = "[" * 100_000
BAD_LINES = {
    "deep": (json.dumps(line("a", seed=0)).replace(" 0", DEEP), "line 1 is nested too deeply"),
    "NaN": (json.dumps(line("a", temperature=float("nan"))), "line 1: NaN is no finite number"),
    "infinite": (json.dumps(line("a", temperature=0)).replace(": 0", ": 1e999"), "line 1: 1e999 is no finite number"),
    "digits": (json.dumps(line("a", seed=0)).replace(": 0", f": {'1' * 5000}"), "line 1: Exceeds the limit"),
    "a text": (json.dumps(line("a", seed="1")), "body.seed is '1', and must be an integer of at most 64 bits"),
    "65 bits": (json.dumps(line("a", seed=2**63)), "body.seed is 9223372036854775808, and must be an integer"),
    "a fraction": (json.dumps(line("a", max_completion_tokens=1.5)), "body.max_completion_tokens is 1.5"),
    "a bool": (json.dumps(line("a", temperature=True)), "body.temperature is True, and must be a number"),
    "stop": (json.dumps(line("a", stop=[1])), "body.stop is [1], and must be a text or a list of texts"),
    "ignore_eos": (json.dumps(line("a", ignore_eos=1)), "body.ignore_eos is 1, and must be true or false"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_an_input_line_that_would_end_the_engine(batch: Batch, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = BAD_LINES[name]
    batch.input.write_text(text + "\n")
    assert batch.run() == 2
    one_error(capsys, message)
    assert not batch.output.exists()


def test_the_deepest_input_line(batch: Batch) -> None:
    """A line that can just be read may be too deep to be written, or read from a function further down."""
    statuses = set()
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() - 30):
        batch.output.unlink(missing_ok=True)
        batch.input.write_text(json.dumps(line("a", model=0)).replace(": 0", f": {'[' * depth}{']' * depth}"))
        statuses.add(batch.run())
    assert 0 in statuses
    assert len(statuses) > 1 or sys.version_info >= (3, 12), "nothing was too deep"


def test_a_refusal_of_what_utf8_does_not_have(batch: Batch) -> None:
    batch.engine.prompts["bad"] = ValueError("\udfff is no text")
    batch.ask(line("a", "bad"))
    assert batch.run() == 1
    assert batch.found()["a"]["error"]["message"] == "\udfff is no text"


def test_llm_arguments_that_are_too_deep(batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        batch.example.main(["in", "out", "--llm", DEEP])
    assert caught.value.code == 2
    assert "--llm" in capsys.readouterr().err
