"""/metrics shows what an operator needs: prefix-cache hits, tokens, and nothing in use when nothing runs."""

from __future__ import annotations

import asyncio
import random

import openai
import pytest

from benchmarks.server import Server
from benchmarks.soak import CACHED_STEP, all_blocks_free

HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


def test_prefix_cache_hits_are_counted(server: Server, client: openai.OpenAI) -> None:
    """The second request finds the whole pages of its beginning: 256 tokens of 300, and of 290 shared ones."""
    stem = [0] + [random.randrange(3, 264) for _ in range(289)]
    before, replies = server.metrics(), []
    for tail in ([7] * 10, [8] * 10):
        replies.append(client.completions.create(model=Server.NAME, prompt=stem + tail, max_tokens=2, temperature=0.0))
    after = server.metrics()
    assert after[QUERIES] - before[QUERIES] == 600
    assert after[HITS] - before[HITS] == CACHED_STEP
    counted = {
        name: after[name] - before[name] for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    }
    usages = [reply.usage for reply in replies]
    assert counted["vllm:prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages) == 600
    assert counted["vllm:generation_tokens_total"] == sum(usage.completion_tokens for usage in usages)


def test_a_short_prompt_is_no_hit(server: Server, client: openai.OpenAI) -> None:
    prompt = [0] + [random.randrange(3, 264) for _ in range(CACHED_STEP - 2)]
    before = server.metrics()
    for _ in range(2):
        client.completions.create(model=Server.NAME, prompt=prompt, max_tokens=1, temperature=0.0)
    assert server.metrics()[HITS] == before[HITS]


def test_nothing_is_in_use_when_nothing_runs(server: Server) -> None:
    assert asyncio.run(all_blocks_free(server)) == 0.0
    metrics = server.metrics()
    assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0


def test_refused_requests_are_counted(server: Server, client: openai.OpenAI) -> None:
    """By their status, so that a client that sends nonsense can be seen."""

    def refused() -> float:
        return server.metrics(status="4xx", handler="/v1/completions").get("http_requests_total", 0.0)

    before = refused()
    for _ in range(3):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a")
    client.completions.create(model=Server.NAME, prompt="a", max_tokens=1)
    assert refused() - before == 3
