"""Requests that cannot be served: a 4xx that says why, and the next request is answered as ever.

The server has our middleware StrictRequests. `ACCEPTED` is what passes even so; docs/operations.md lists it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from testing.client import MAX_MODEL_LEN, REQUEST_TIMEOUT, Question
from testing.server import Server
from testing.serving.messages import nested

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOY_VOCABULARY = 264


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """What the `openai` client would not let through."""
    with httpx.Client(base_url=server.url, timeout=REQUEST_TIMEOUT) as http:
        yield http


@pytest.fixture(autouse=True)
def _next_request_is_served(http: httpx.Client, questions: list[Question]) -> Iterator[None]:
    yield
    question = min(questions, key=lambda question: len(question.prompt))
    reply = http.post(COMPLETIONS, json=completion(
        prompt=list(question.prompt), max_tokens=4, ignore_eos=True, return_token_ids=True
    ))  # fmt: skip
    assert reply.status_code == 200, reply.text
    assert tuple(reply.json()["choices"][0]["token_ids"]) == question.answer[:4]


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": Server.NAME, "prompt": "14+36?", "max_tokens": 4, "temperature": 0.0} | changes


def chat(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "14+36?"}]
    return {"model": Server.NAME, "messages": messages, "max_tokens": 4, "temperature": 0.0} | changes


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


# id: (path, body, what the message must say)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a text over the context": (
        COMPLETIONS, completion(prompt="7" * 3 * MAX_MODEL_LEN), f"maximum context length is {MAX_MODEL_LEN}"),
    "a conversation over the context": (
        CHAT, chat(messages=user("7" * 3 * MAX_MODEL_LEN)), f"maximum context length is {MAX_MODEL_LEN}"),
    "token ids that fill the context": (COMPLETIONS, completion(prompt=[5] * MAX_MODEL_LEN), "max_tokens"),
    "max_tokens over the context": (CHAT, chat(max_tokens=100_000), f"max_model_len={MAX_MODEL_LEN}"),
    "max_completion_tokens over the context": (CHAT, chat(max_completion_tokens=100_000), "max_completion_tokens"),
    "max_tokens 0": (CHAT, chat(max_tokens=0), "max_tokens must be at least 1"),
    "max_tokens negative": (COMPLETIONS, completion(max_tokens=-1), "max_tokens must be at least 1"),
    "max_tokens is a word": (COMPLETIONS, completion(max_tokens="many"), "valid integer"),
    "max_tokens above 64 bits": (COMPLETIONS, completion(max_tokens=2**70), "max_tokens"),
    "temperature": (COMPLETIONS, completion(temperature=-1), "temperature must be non-negative"),
    "top_p": (COMPLETIONS, completion(top_p=0), "top_p must be in (0, 1]"),
    "n": (COMPLETIONS, completion(n=0), "n must be at least 1"),
    "seed": (COMPLETIONS, completion(seed=2**70), "seed=1180591620717411303424: has more than 64 bits"),
    "logprobs": (COMPLETIONS, completion(logprobs=99), "max allowed: 20"),
    "an empty stop string": (COMPLETIONS, completion(stop=""), "stop cannot contain an empty string"),
    "min_tokens above max_tokens": (COMPLETIONS, completion(min_tokens=9), "min_tokens"),
    "another model": (COMPLETIONS, completion(model="other"), "The model `other` does not exist"),
    "another model, chat": (CHAT, chat(model="other"), "The model `other` does not exist"),
    "no prompt": (COMPLETIONS, completion(prompt=None), "prompt"),
    "an empty text": (COMPLETIONS, completion(prompt=""), "non-empty"),
    "no token ids": (COMPLETIONS, completion(prompt=[]), "at least one prompt"),
    "an empty prompt among others": (COMPLETIONS, completion(prompt=[""]), "cannot be empty"),
    "a token id below 0": (COMPLETIONS, completion(prompt=[-1]), "body.prompt"),
    "a token id above the vocabulary": (COMPLETIONS, completion(prompt=[5, TOY_VOCABULARY]), "out of vocabulary"),
    "a number as prompt": (COMPLETIONS, completion(prompt=3), "body.prompt"),
    "a lone surrogate": (COMPLETIONS, completion(prompt="a\ud800b"), ""),
    "no messages": (CHAT, {key: value for key, value in chat().items() if key != "messages"}, "body.messages"),
    "messages is a text": (CHAT, chat(messages="hi"), "valid list"),
    "an unknown role": (CHAT, chat(messages=[{"role": "wizard", "content": "a"}]), "wizard"),
    "content is a number": (CHAT, chat(messages=user(3)), "body.messages.0"),
    "an image": (CHAT, chat(messages=user([{"type": "image_url", "image_url": {"url": "data:,"}}])), "multimodal"),
    "a lone surrogate in a message": (CHAT, chat(messages=user("a\ud800b")), ""),
    "an unknown effort": (CHAT, chat(reasoning_effort="extreme"), "'none', 'minimal', 'low'"),
    "a chat template": (CHAT, chat(chat_template="{{ 1/0 }}"), "trust-request-chat-template"),
    "a schema that is none": (
        CHAT, chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "b"}}}),
        "Grammar error"),
    "a tool without its function": (CHAT, chat(tools=[{"type": "function"}]), "body.tools.0.function"),
    "an unknown parameter": (COMPLETIONS, completion(frobnicate=1), "frobnicate=1: unknown to /v1/completions"),
    "unknown parameters, chat": (CHAT, chat(guided_json={}, best=1), "best=1, guided_json={}: unknown to /v1/chat"),
    "best_of": (COMPLETIONS, completion(best_of=3), "best_of=3: unknown to"),
    "thinking that is neither": (CHAT, chat(thinking={"type": "auto"}), '{"type": "disabled"}'),
    "a number of more than 64 bits": (COMPLETIONS, completion(top_k=2**70), "top_k=1180591620717411303424: has"),
    "a budget of more than 64 bits": (CHAT, chat(thinking_token_budget=2**70), "thinking_token_budget=118059162"),
    "deeply nested": (
        CHAT, chat(kv_transfer_params=nested(600)),
        "objects and arrays nest deeper than 144 levels"),
    "deeply nested arguments": (
        CHAT, chat(messages=[
            *user("a"),
            {"role": "assistant", "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[" * 50_000}}]},
        ]),
        "messages[1].tool_calls[0].function.arguments="),
    "tool_choice without tools": (CHAT, chat(tool_choice="auto"), "tools"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(http: httpx.Client, name: str) -> None:
    path, body, message = REFUSED[name]
    reply = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == (404 if "another model" in name else 400), reply.text
    error = reply.json()["error"]
    assert error["code"] == reply.status_code
    assert message in error["message"]
    assert error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{not json", id="not JSON"),
        pytest.param(b'{"model": "model", "prompt": "a', id="cut off"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"model": "model", "prompt": "a\xff\xfe"}', id="not UTF-8"),
        pytest.param(b'{"model": "model", "prompt": "\xe4\xbd"}', id="a cut UTF-8 character"),
        pytest.param(b"[" * 100_000, id="deeply nested"),
    ],
)
def test_a_body_that_is_no_request(http: httpx.Client, path: str, body: bytes) -> None:
    reply = http.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    # vLLM's own errors are in OpenAI's form; those of a body that is no JSON text at all come from FastAPI.
    said = reply.json()
    assert said.get("detail") or said["error"]["message"]


def test_a_body_of_another_type(http: httpx.Client) -> None:
    reply = http.post(COMPLETIONS, content=json.dumps(completion()), headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    assert "application/json" in reply.text


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("DELETE", CHAT), ("POST", "/v1/nothing")])
def test_a_wrong_method_or_path(http: httpx.Client, method: str, path: str) -> None:
    assert http.request(method, path).status_code in (404, 405)


ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "no model name": (COMPLETIONS, completion(model="")),
    "suffix": (COMPLETIONS, completion(suffix="a")),
    "content left out": (CHAT, chat(messages=[{"role": "user"}])),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_without_a_word(http: httpx.Client, name: str) -> None:
    """As it is in stock vLLM: these are answered as if the client had not sent them."""
    path, body = ACCEPTED[name]
    assert http.post(path, json=body).status_code == 200


def test_the_longest_prompt_is_served(http: httpx.Client) -> None:
    """One token of the context is for the answer; max_tokens of a completion is cut to what is left."""
    body = completion(prompt=[0] + [5] * (MAX_MODEL_LEN - 2), max_tokens=50, ignore_eos=True)
    usage = http.post(COMPLETIONS, json=body).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (MAX_MODEL_LEN - 1, 1)
