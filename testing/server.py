"""A `vllm serve` process under test: its start, processes, metrics and end.

with Server(DIR, Path("log.txt"), ("--max-model-len", "1024")) as server:
    server.wait_until_healthy()
    client = openai.OpenAI(base_url=server.api, api_key="unused")
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from urllib.error import URLError

import psutil
from prometheus_client.parser import text_string_to_metric_families

# One OpenMP thread and no binding to cores: several processes share these.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}
FRONT_END = "front end"
# A start takes 25 s on idle cores, and 30 more where kernels must be compiled first. Other work may share the cores.
START_SECONDS = 1200


class ServerError(Exception):
    """The server did not start or end as expected; the message ends with the last lines of its log."""


def serve_command() -> list[str]:
    """`vllm serve`; with vllm-cpu alone the module that it runs, because the command needs the distribution `vllm`."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


def free_port() -> int:
    """A port below those that the kernel assigns (32768 and up on Linux).

    A server binds its port after its imports, seconds later; until then the kernel does not give it to another process.
    """
    while True:
        # Not from the test's seed, which another process may use at the same time.
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


class Server:
    """A server on a free port of 127.0.0.1 that calls its model `NAME`; the process starts at once.

    Args:
        model: the checkpoint directory.
        log: the file that all of its processes write to.
        options: further arguments of `vllm serve`.
        environment: variables added to `ENVIRONMENT` and the caller's own.
    """

    NAME = "model"

    def __init__(
        self, model: Path, log: Path, options: tuple[str, ...] = (), environment: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.log = log
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", self.NAME]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*serve_command(), str(model), *place, *options],
                env=os.environ | ENVIRONMENT | (environment or {}),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        """The base URL for the `openai` client."""
        return f"{self.url}/v1"

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (URLError, OSError):  # not listening yet, or no longer
            return False

    def wait_until_healthy(self, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.healthy():
            if not self.alive():
                raise ServerError(f"the server ended with status {self.process.returncode}:\n{self._last_lines()}")
            if time.monotonic() > deadline:
                raise ServerError(f"the server is not healthy after {seconds:.0f} s:\n{self._last_lines()}")
            time.sleep(0.2)

    def _last_lines(self) -> str:
        return "\n".join(self.output().splitlines()[-40:])

    def processes(self) -> dict[str, psutil.Process]:
        """The front end, the engine core and every worker, by vLLM's names for them."""
        front = psutil.Process(self.process.pid)
        found = {FRONT_END: front}
        for child in front.children(recursive=True):
            title = " ".join(child.cmdline())
            if title.startswith("VLLM::"):
                found[title.removeprefix("VLLM::").strip()] = child
        return found

    def metrics(self, **labels: str) -> dict[str, float]:
        """Every counter and gauge of /metrics by name, summed over the labels that are not given."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=600) as response:
            text = response.read().decode()
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if labels.items() <= sample.labels.items():
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    def send(self, number: signal.Signals) -> None:
        """A signal to the front end alone."""
        self.process.send_signal(number)

    def wait_until_gone(self, family: list[psutil.Process], seconds: float) -> int:
        """Wait until the front end and all of `family` have ended; returns the front end's exit status.

        Raises:
            ServerError: one of them is still running after `seconds`.
        """
        deadline = time.monotonic() + seconds
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ServerError(f"the server is still running after {seconds:.0f} s:\n{self._last_lines()}") from None
        _, alive = psutil.wait_procs(family, timeout=max(1.0, deadline - time.monotonic()))
        if alive:
            raise ServerError(f"the server has left processes behind: {alive}")
        return status

    def kill(self) -> None:
        """End the server and those of its children that are left with SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Servers:
    """One server at a time, restarted for the next test after one has ended it.

    Args:
        model: the checkpoint directory.
        directory: where the logs go.
        options, environment: as for `Server`.
    """

    def __init__(
        self, model: Path, directory: Path, options: tuple[str, ...] = (), environment: dict[str, str] | None = None
    ) -> None:
        self.model, self.directory, self.options, self.environment = model, directory, options, environment
        self._server: Server | None = None
        self._count = 0
        self._failure: ServerError | None = None

    def get(self) -> Server:
        """A healthy server. A start that failed is not repeated for every test: its error is raised again."""
        if self._failure is not None:
            raise self._failure
        if self._server is None or not self._server.alive():
            self.close()
            self._count += 1
            log = self.directory / f"server_{self._count}.log"
            self._server = Server(self.model, log, self.options, self.environment)
            try:
                self._server.wait_until_healthy()
            except ServerError as error:
                self._failure = error
                raise
        return self._server

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()
