"""A `vllm serve` on the toy that the tests of this folder share; whoever ends it makes the next test start another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from testing.asking import ENVIRONMENT, REQUEST_TIMEOUT, Question, ask_each_alone, make_prompts, vllm_options
from testing.server import Server, ServerError
from testing.tiny import TOY

CHAT_OPTIONS = (
    "--reasoning-parser", "deepseek_v4", "--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v4",
    "--middleware", "vllm_deepseek_v4flash.serving.middleware.StrictRequests",
)  # fmt: skip


class Servers:
    """One server at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._server: Server | None = None
        self._count = 0
        self._failure: ServerError | None = None

    def get(self) -> Server:
        """The running one, or another one if it has ended. What does not start once is not tried for each test."""
        if self._failure is not None:
            raise self._failure
        if self._server is None or not self._server.alive():
            self.close()
            self._count += 1
            log = self.directory / f"server_{self._count}.log"
            self._server = Server(TOY, log, (*vllm_options(), *CHAT_OPTIONS), ENVIRONMENT)
            try:
                self._server.wait_until_healthy()
            except ServerError as error:
                self._failure = error
                raise
        return self._server

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()


# For the folder, not the session: an idle server holds 2 GiB. With pytest-xdist each worker has its own.
@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.close()


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.get()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.api, api_key="unused", timeout=REQUEST_TIMEOUT, max_retries=0) as client:
        yield client


@pytest.fixture(scope="package")
def questions(servers: Servers) -> list[Question]:
    """Prompts of 1 to 640 tokens, some of which share 256 or 512, with their answers when each is asked alone."""
    return asyncio.run(ask_each_alone(servers.get(), make_prompts(20, seed=0), 24))
