"""Requests with known answers to a `vllm serve` on the toy that has a short context and few KV blocks."""

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
# 1,100 tokens of the toy: too little for two of the longest prompts at once, so decoding requests preempt each other.
CACHE_MIB = 34
OPTIONS = (
    "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16",
    "--max-num-batched-tokens", "256", "--middleware", "vllm_deepseek_v4flash.serving.middleware.FailWithEngine",
    "--scheduling-policy", "priority",
)  # fmt: skip
# By default oneDNN caches the code of 1,024 matmuls, 70 KiB for each shape, which makes a CPU worker grow for an hour.
# With a small cache that growth ends within the warm-up, and what grows later is a leak.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# In logprobs. The order of fp32 sums changes with the batch and moves a logprob by about 1e-5 (tests/scheduler).
# An answer is compared up to the first token whose lead over the second is not above this.
CLEAR = 1e-3
# Seconds. A step of this model takes 0.02 on an idle core: these tell what hangs, not what is slow.
REQUEST_TIMEOUT = 1200
FAILURE_TIMEOUT = 120
STOP_TIMEOUT = 600


def vllm_options(
    tensor: int = 1, pipeline: int = 1, cache_mib: int = CACHE_MIB, stop_seconds: int = STOP_TIMEOUT // 2
) -> tuple[str, ...]:
    """Arguments of `vllm serve`. stop_seconds: how long running requests may take to finish after a SIGTERM."""
    sizes = {"tensor": tensor, "pipeline": pipeline}
    parallel = [f"--{name}-parallel-size={size}" for name, size in sizes.items() if size > 1]
    cache = f"--kv-cache-memory-bytes={cache_mib << 20}"
    return (*OPTIONS, cache, f"--shutdown-timeout={stop_seconds}", *parallel)


@dataclass(frozen=True)
class Question:
    """A prompt, and the greedy tokens that follow it when it runs alone, up to the first that was no clear choice."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """What a request asks for next to its greedy answer. seed: with one, the only candidate is drawn at random.

    priority: the lowest is scheduled first, and preempted last.
    """

    choices: int = 1
    seed: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        # vLLM refuses several choices of a greedy request.
        assert self.choices == 1 or self.seed is not None

    def options(self) -> dict[str, Any]:
        drawn = {"temperature": 0.0} if self.seed is None else {"temperature": 1.0, "seed": self.seed}
        extra = {"top_k": 1, "priority": self.priority, "ignore_eos": True, "return_token_ids": True}
        return {"n": self.choices, **drawn, "extra_body": extra}


def client_of(server: Server) -> openai.AsyncOpenAI:
    """A client without retries. It does not reuse connections: the server closes one that has been idle for 5 s, and a
    request sent at that moment fails (docs/operations.md)."""
    return openai.AsyncOpenAI(
        base_url=server.api, api_key="unused", timeout=REQUEST_TIMEOUT, max_retries=0,
        default_headers={"Connection": "close"},
    )  # fmt: skip


def make_prompts(count: int, seed: int, vocab_size: int = 264) -> list[tuple[int, ...]]:
    """Random prompts without special tokens: of every 10, 6 are short and 4 begin with one of two shared texts."""
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
    """The next `tokens` greedy token ids after `prompt`, as `ask_choices` gets them."""
    (found,) = await ask_choices(client, prompt, tokens, Sampling(), stream, begun)
    return found


async def ask_choices(
    client: openai.AsyncOpenAI,
    prompt: Sequence[int],
    tokens: int,
    sampling: Sampling,
    stream: bool = False,
    begun: asyncio.Event | None = None,
) -> list[list[int]]:
    """The next `tokens` token ids after `prompt` of every choice; AssertionError if the reply is incomplete.

    Args:
        begun: is set when the first token of a stream arrives.
    """
    options = {"model": Server.NAME, "prompt": list(prompt), "max_tokens": tokens, **sampling.options()}
    found: list[list[int]] = [[] for _ in range(sampling.choices)]
    reasons: list[str | None] = [None] * sampling.choices
    if stream:
        async with await client.completions.create(stream=True, **options) as chunks:
            async for chunk in chunks:
                if begun is not None:
                    begun.set()
                for choice in chunk.choices:
                    found[choice.index] += getattr(choice, "token_ids", None) or ()
                    reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    else:
        reply = await client.completions.create(**options)
        for choice in reply.choices:
            found[choice.index], reasons[choice.index] = list(choice.token_ids), choice.finish_reason
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(prompt), reply.usage
    for ids, reason in zip(found, reasons, strict=True):
        assert (len(ids), reason) == (tokens, "length"), f"{len(ids)} of {tokens} tokens, finished by {reason!r}"
    return found


async def ask_alone(client: openai.AsyncOpenAI, prompt: tuple[int, ...], tokens: int, salt: str) -> Question:
    """The reference for `prompt`. salt: not used by any request before, so that nothing is read from the cache."""
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
    """Ask one after another. Prompts whose first token is no clear choice are left out."""
    async with client_of(server) as client:
        found = [await ask_alone(client, prompt, tokens, f"alone {time.time_ns()}") for prompt in prompts]
    questions = [question for question in found if question.answer]
    assert 2 * len(questions) > len(prompts), (
        f"{len(questions)} of {len(prompts)} prompts have a clear answer: use other weights"
    )
    return questions


async def wait_for_prompts(server: Server, count: float) -> None:
    """Wait until `server` has computed this many prompt tokens since its start: a counter, which no delay can miss."""
    async with asyncio.timeout(REQUEST_TIMEOUT):
        while (await asyncio.to_thread(server.metrics))["vllm:prompt_tokens_total"] < count:
            await asyncio.sleep(0.1)


async def all_blocks_free(server: Server, seconds: float = FAILURE_TIMEOUT) -> float:
    """The share of KV blocks in use when nothing runs: 0.0, or what is still held after `seconds`.

    vLLM updates the gauge at the end of a step, so after aborts it takes another request to see the change.
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
