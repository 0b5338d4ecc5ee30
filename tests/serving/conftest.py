"""A `vllm serve` on the toy that the tests of this folder share; whoever ends it makes the next test start another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from testing.client import ENVIRONMENT, REQUEST_TIMEOUT, Question, ask_each_alone, make_prompts, vllm_options
from testing.server import Server, Servers
from testing.tiny import TOY

CHAT_OPTIONS = (
    "--reasoning-parser", "deepseek_v4", "--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v4",
    "--middleware", "vllm_deepseek_v4flash.serving.middleware.StrictRequests",
)  # fmt: skip


# For the folder, not the session: an idle server holds 2 GiB. With pytest-xdist each worker has its own.
@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(TOY, tmp_path_factory.mktemp("servers"), (*vllm_options(), *CHAT_OPTIONS), ENVIRONMENT)
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
