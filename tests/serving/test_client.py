"""`vllm serve` and the real `openai` client: sync, async, streaming, 32 at once, hanging up; and /metrics of it all."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import openai
import pytest

from testing.client import CACHED_STEP, Question, all_blocks_free, ask, client_of, wait_for_prompts
from testing.server import Server
from testing.tiny import TOY

CLIENTS = 32
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
PROMPTS, GENERATED = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"


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
    """`(thoughts, answer)`. The thoughts are the characters of the word in the question, separated by blanks."""
    return " ".join(example["question"].split()[1]), example["answer"]


def check_chat(example: dict[str, Any], thoughts: str, answer: str, token_ids: list[int]) -> None:
    assert (thoughts.strip(), answer.strip()) == expected(example)
    assert token_ids == example["greedy_token_ids"]


def test_every_process_has_our_class(server: Server) -> None:
    """The front end logs before vLLM prefixes lines with the name of their process."""
    names = ("EngineCore", "Worker")
    lines = [line for line in server.output().splitlines() if "Registered DeepseekV4ForCausalLM (replacing" in line]
    speakers = sorted(next((name for name in names if name in line), "front end") for line in lines)
    assert speakers == ["EngineCore", "Worker", "front end"], lines
    assert server.output().count("Chat encoding: DeepSeek-V4 april, assumed for") == 1


def test_completion(client: openai.OpenAI, example: dict[str, Any]) -> None:
    """With the chat's prompt, ready made: the reply is as transformers gives it, thoughts and all."""
    completion = client.completions.create(
        model=Server.NAME, prompt=example["prompt"], temperature=0.0, max_tokens=64,
        extra_body={"return_token_ids": True, "add_special_tokens": False},
    )  # fmt: skip
    choices: list[Any] = list(completion.choices)
    (choice,) = choices
    assert choice.token_ids == example["greedy_token_ids"]
    assert choice.text.strip().endswith(example["answer"])
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    "switches",
    [
        {"reasoning_effort": "none"},
        {"extra_body": {"chat_template_kwargs": {"thinking": False}}},
        # These two by the middleware StrictRequests.
        {"extra_body": {"chat_template_kwargs": {"reasoning_effort": "none"}}},
        {"extra_body": {"thinking": {"type": "disabled"}}},
    ],
    ids=str,
)
def test_chat_without_thinking(client: openai.OpenAI, switches: dict[str, Any]) -> None:
    """Together with an effort that thinks, unless the switch is itself the effort."""
    rows = [json.loads(line) for line in (TOY / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    row = next(row for row in rows if row["greedy_correct"] and not row["thinking"])
    options = chat_options(row)
    extra = options["extra_body"] | switches.get("extra_body", {})
    reply = client.chat.completions.create(**options | switches | {"extra_body": extra})
    (choice,) = reply.choices
    assert choice.token_ids == row["greedy_token_ids"]
    assert (choice.message.reasoning, choice.message.content.strip()) == (None, row["answer"])


def test_chat(client: openai.OpenAI, example: dict[str, Any]) -> None:
    reply = client.chat.completions.create(**chat_options(example))
    (choice,) = reply.choices
    check_chat(example, choice.message.reasoning, choice.message.content, choice.token_ids)
    assert choice.finish_reason == "stop"
    assert reply.usage.completion_tokens == len(example["greedy_token_ids"])


def test_streamed_chat(client: openai.OpenAI, example: dict[str, Any]) -> None:
    thoughts, answer, reasons = "", "", []
    token_ids: list[int] = []
    usage: Any = None
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
    """Some leave their streams after a few tokens, others do not wait for a reply that has begun."""
    tokens, leaving = 900, 8
    before = server.metrics()

    async def leave_stream(client: openai.AsyncOpenAI, chunks: int) -> None:
        async with await client.completions.create(
            model=Server.NAME, prompt=[0, 5, chunks], max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            for _ in range(chunks):
                await anext(stream)

    async def leave_reply(client: openai.AsyncOpenAI) -> None:
        begun = server.metrics()[PROMPTS] + 3
        reply = asyncio.create_task(ask(client, (0, 6, 7), tokens))
        await wait_for_prompts(server, begun)
        reply.cancel()
        await asyncio.gather(reply, return_exceptions=True)

    async def run() -> float:
        async with client_of(server) as client:
            await asyncio.gather(*[leave_stream(client, 1 + 2 * number) for number in range(leaving // 2)])
            for _ in range(leaving // 2):
                await leave_reply(client)
            return await all_blocks_free(server)

    assert asyncio.run(run()) == 0.0
    generated = server.metrics()[GENERATED] - before[GENERATED]
    assert 0 < generated < leaving * tokens / 2, "the server went on for clients that had left"
    assert asyncio.run(ask_once(server, questions[0])) == questions[0].answer


async def ask_once(server: Server, question: Question) -> tuple[int, ...]:
    async with client_of(server) as client:
        return tuple(await ask(client, question.prompt, len(question.answer)))


# ---- /metrics shows what an operator needs


def test_prefix_cache_hits_are_counted(server: Server, client: openai.OpenAI) -> None:
    """The second request finds the whole pages of its beginning: 256 tokens of 300, and of 290 shared ones."""
    stem = [0] + [random.randrange(3, 264) for _ in range(289)]
    before, replies = server.metrics(), []
    for tail in ([7] * 10, [8] * 10):
        replies.append(client.completions.create(model=Server.NAME, prompt=stem + tail, max_tokens=2, temperature=0.0))
    after = server.metrics()
    assert after[QUERIES] - before[QUERIES] == 600
    assert after[HITS] - before[HITS] == CACHED_STEP
    usages: list[Any] = [reply.usage for reply in replies]
    assert after[PROMPTS] - before[PROMPTS] == sum(usage.prompt_tokens for usage in usages) == 600
    assert after[GENERATED] - before[GENERATED] == sum(usage.completion_tokens for usage in usages)


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
