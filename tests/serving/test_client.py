"""The real `openai` client, sync, async and streaming, 32 at once, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import openai
import pytest

from benchmarks.server import Server
from benchmarks.soak import Question, all_blocks_free, ask, client_of
from tests.tiny import TOY

CLIENTS = 32


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """A question of the toy that transformers answers rightly, after thinking, greedily in fp32."""
    rows = [json.loads(line) for line in (TOY / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(row for row in rows if row["greedy_correct"] and row["thinking"] and row["task"] == "reverse")


def chat_options(example: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": example["question"]}]
    return {
        "model": Server.NAME, "messages": messages, "reasoning_effort": "high", "temperature": 0.0, "max_tokens": 64,
        "extra_body": {"return_token_ids": True},
    }  # fmt: skip


def expected(example: dict[str, Any]) -> tuple[str, str]:
    """`(thoughts, answer)`. The thoughts are the characters of the question's word, apart from each other."""
    return " ".join(example["question"].split()[1]), example["answer"]


def check_chat(example: dict[str, Any], thoughts: str, answer: str, token_ids: list[int]) -> None:
    assert (thoughts.strip(), answer.strip()) == expected(example)
    assert token_ids == example["greedy_token_ids"]


def test_chat(client: openai.OpenAI, example: dict[str, Any]) -> None:
    reply = client.chat.completions.create(**chat_options(example))
    (choice,) = reply.choices
    check_chat(example, choice.message.reasoning, choice.message.content, choice.token_ids)
    assert choice.finish_reason == "stop"
    assert reply.usage.completion_tokens == len(example["greedy_token_ids"])


def test_streamed_chat(client: openai.OpenAI, example: dict[str, Any]) -> None:
    thoughts, answer, token_ids, reasons = "", "", [], []
    usage = None
    for chunk in client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **chat_options(example)
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thoughts += getattr(choice.delta, "reasoning", None) or ""
            answer += choice.delta.content or ""
            token_ids += getattr(choice, "token_ids", None) or []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    check_chat(example, thoughts, answer, token_ids)
    assert reasons == ["stop"]
    assert usage.completion_tokens == len(example["greedy_token_ids"])


def test_async_chat(server: Server, example: dict[str, Any]) -> None:
    async def run() -> Any:
        async with client_of(server) as client:
            return await client.chat.completions.create(**chat_options(example))

    (choice,) = asyncio.run(run()).choices
    check_chat(example, choice.message.reasoning, choice.message.content, choice.token_ids)


def test_32_clients_at_once_get_the_answers_of_each_alone(server: Server, questions: list[Question]) -> None:
    """Prompts of many lengths, with and without a cached beginning, streamed and not."""
    drawn = [random.choice(questions) for _ in range(CLIENTS)]
    assert min(len(question.prompt) for question in drawn) < 60 < 512 < max(len(question.prompt) for question in drawn)

    async def one(number: int, question: Question) -> list[int]:
        async with client_of(server) as client:
            return await ask(client, question.prompt, len(question.answer), stream=number % 2 == 0)

    async def run() -> list[list[int]]:
        return await asyncio.gather(*[one(number, question) for number, question in enumerate(drawn)])

    assert [tuple(found) for found in asyncio.run(run())] == [question.answer for question in drawn]


def test_blocks_of_clients_that_hang_up_are_freed(server: Server, questions: list[Question]) -> None:
    """Some leave their stream after a few tokens, others do not wait for the whole reply."""
    tokens, leaving = 900, 8  # more than the server makes until the last one leaves
    before = server.metrics()["vllm:generation_tokens_total"]

    async def leave_stream(client: openai.AsyncOpenAI, chunks: int) -> None:
        async with await client.completions.create(
            model=Server.NAME, prompt=[0, 5, chunks], max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            for _ in range(chunks):
                await anext(stream)

    async def leave_reply(client: openai.AsyncOpenAI, seconds: float) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await ask(client, (0, 6, 7), tokens)

    async def run() -> float:
        async with client_of(server) as client:
            streams = [leave_stream(client, 1 + 2 * number) for number in range(leaving // 2)]
            replies = [leave_reply(client, 0.3 * number) for number in range(leaving // 2)]
            await asyncio.gather(*streams, *replies)
            return await all_blocks_free(server)

    assert asyncio.run(run()) == 0.0
    generated = server.metrics()["vllm:generation_tokens_total"] - before
    assert 0 < generated < leaving * tokens / 2, "the server went on for clients that had left"
    assert asyncio.run(ask_once(server, questions[0])) == questions[0].answer


async def ask_once(server: Server, question: Question) -> tuple[int, ...]:
    async with client_of(server) as client:
        return tuple(await ask(client, question.prompt, len(question.answer)))
