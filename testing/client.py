"""Requests of which every answer is known, to a `vllm serve` on the toy with a short context and few KV blocks."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openai

from testing.server import Server

# vLLM finds a prefix in the cache by whole multiples of this many tokens (the toy's ratio-128 pages).
CACHED_STEP = 256
MAX_PROMPT = 2 * CACHED_STEP + 128
MAX_MODEL_LEN = 1024
# 1,100 tokens of the toy: two of the longest prompts do not fit at once, and decoding requests preempt each other.
CACHE_MIB = 34
OPTIONS = (
    "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16",
    "--max-num-batched-tokens", "256", "--middleware", "vllm_deepseek_v4flash.serving.middleware.FailWithEngine",
)  # fmt: skip
# oneDNN keeps the code of 1024 matmuls, one for each shape and 70 KiB each, by default: the growth of a worker's first
# hour on a CPU. Kept to few, that ends within the warm-up, and what grows after it is a leak.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# In logprobs. The order of fp32 sums, which changes with the batch, moves a logprob by some 1e-5 (tests/scheduler);
# an answer is compared up to the first token that was not chosen more clearly than this.
CLEAR = 1e-3
# Seconds. A step of this model takes 0.02, so that a request which takes this long hangs.
REQUEST_TIMEOUT = 300
FAILURE_TIMEOUT = 30
STOP_TIMEOUT = 120


def vllm_options(
    tensor: int = 1, pipeline: int = 1, cache_mib: int = CACHE_MIB, stop_seconds: int = STOP_TIMEOUT // 2
) -> tuple[str, ...]:
    """Arguments of `vllm serve`; `stop_seconds` is what SIGTERM leaves to running requests."""
    sizes = {"tensor": tensor, "pipeline": pipeline}
    parallel = [f"--{name}-parallel-size={size}" for name, size in sizes.items() if size > 1]
    cache = f"--kv-cache-memory-bytes={cache_mib << 20}"
    return (*OPTIONS, cache, f"--shutdown-timeout={stop_seconds}", *parallel)


@dataclass(frozen=True)
class Question:
    """A prompt, and the greedy tokens that follow it when it is asked alone, as far as each was a clear choice."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def client_of(server: Server) -> openai.AsyncOpenAI:
    """A client that asks once. No connection is used again: the server closes one that has been idle for 5 s, and a
    request that meets the end of it fails (docs/operations.md)."""
    return openai.AsyncOpenAI(
        base_url=server.api, api_key="unused", timeout=REQUEST_TIMEOUT, max_retries=0,
        default_headers={"Connection": "close"},
    )  # fmt: skip


def make_prompts(count: int, seed: int, vocab_size: int = 264) -> list[tuple[int, ...]]:
    """Random prompts without special tokens: 6 of 10 short ones, and 4 that begin with one of two shared texts."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocab_size) for _ in range(length))

    stems = [(0, *ids(CACHED_STEP - 1)), (0, *ids(2 * CACHED_STEP - 1))]
    prompts = []
    for number in range(count):
        if number % 10 < 6:
            prompts.append((0, *ids(draw.randrange(CACHED_STEP // 2))))
        else:
            prompts.append(stems[number % 10 == 9] + ids(draw.randint(1, MAX_PROMPT - 2 * CACHED_STEP)))
    return prompts


async def ask(
    client: openai.AsyncOpenAI,
    prompt: Sequence[int],
    tokens: int,
    stream: bool = False,
    begun: asyncio.Event | None = None,
) -> list[int]:
    """Greedily `tokens` token ids after `prompt`; AssertionError where the reply is not of that form.

    Args:
        begun: is set by the first token of a stream.
    """
    options: dict[str, Any] = {
        "model": Server.NAME, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }  # fmt: skip
    found: list[int] = []
    if stream:
        reason = None
        async with await client.completions.create(stream=True, **options) as chunks:
            async for chunk in chunks:
                if begun is not None:
                    begun.set()
                found += getattr(chunk.choices[0], "token_ids", None) or ()
                reason = chunk.choices[0].finish_reason or reason
    else:
        reply = await client.completions.create(**options)
        found, reason = list(reply.choices[0].token_ids), reply.choices[0].finish_reason  # type: ignore[attr-defined]
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(prompt), reply.usage
    assert (len(found), reason) == (tokens, "length"), f"{len(found)} of {tokens} tokens, finished by {reason!r}"
    return found


async def ask_alone(client: openai.AsyncOpenAI, prompt: tuple[int, ...], tokens: int, salt: str) -> Question:
    """The reference for `prompt`; `salt` must be one that no request had before, so that nothing is cached."""
    reply = await client.completions.create(
        model=Server.NAME, prompt=list(prompt), max_tokens=tokens, temperature=0.0, logprobs=2,
        extra_body={
            "ignore_eos": True, "return_token_ids": True, "cache_salt": salt, "return_tokens_as_token_ids": True,
        },
    )  # fmt: skip
    (choice,) = reply.choices
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    margins = []
    for row in choice.logprobs.top_logprobs:
        best, second = sorted(row.values(), reverse=True)[:2]
        margins.append(best - second)
    clear = list(itertools.takewhile(lambda margin: margin > CLEAR, margins))
    return Question(prompt, tuple(choice.token_ids[: len(clear)]))  # type: ignore[attr-defined]


async def ask_each_alone(server: Server, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[Question]:
    """One after another. Prompts whose first token already hangs on rounding are left out."""
    async with client_of(server) as client:
        found = [await ask_alone(client, prompt, tokens, f"alone {time.time_ns()}") for prompt in prompts]
    questions = [question for question in found if question.answer]
    assert 2 * len(questions) > len(prompts), "most of these prompts have no clear answer: use other weights"
    return questions


async def all_blocks_free(server: Server, seconds: float = FAILURE_TIMEOUT) -> float:
    """The share of KV blocks in use once nothing runs: 0.0, or what is still held after `seconds`.

    vLLM sets the gauge at the end of a step, so that after aborts it takes one more request to see it.
    """
    deadline = time.monotonic() + seconds
    async with client_of(server) as client:
        while True:
            await ask(client, (0, 5), 1)
            metrics = await asyncio.to_thread(server.metrics)
            used = metrics["vllm:kv_cache_usage_perc"]
            idle = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"] == 0
            if (idle and used == 0) or time.monotonic() > deadline:
                return used
            await asyncio.sleep(0.2)
