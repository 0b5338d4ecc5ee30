"""The middlewares without a server: what they refuse, change and pass. test_limits.py and test_soak.py serve them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, HTTPException, Request

from testing.serving.messages import nested
from vllm_deepseek_v4flash.serving import middleware
from vllm_deepseek_v4flash.serving.middleware import CHAT, COMPLETIONS, FailWithEngine, StrictRequests, normalize

MESSAGES = [{"role": "user", "content": "U"}]


def chat(**body):
    return {"model": "m", "messages": MESSAGES} | body


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ({}, {}),
        ({"reasoning_effort": "max", "chat_template_kwargs": {"thinking": True}}, {}),
        ({"reasoning_effort": "max", "chat_template_kwargs": {"reasoning_effort": "high"}}, {}),
        (
            {"reasoning_effort": "max", "chat_template_kwargs": {"reasoning_effort": "none"}},
            {"reasoning_effort": "none"},
        ),
        ({"chat_template_kwargs": {"reasoning_effort": "none"}}, {"reasoning_effort": "none"}),
        ({"chat_template_kwargs": None}, {}),
        ({"chat_template_kwargs": [1]}, {}),
    ],
    ids=str,
)
def test_no_effort_wins(body, changes):
    assert normalize(CHAT, chat(**body)) == chat(**body) | changes


@pytest.mark.parametrize(
    ("kind", "inside", "expected"),
    [
        ("disabled", None, {"thinking": False}),
        ("enabled", {"reasoning_effort": "max"}, {"thinking": True, "reasoning_effort": "max"}),
        ("disabled", {"thinking": True}, {"thinking": False}),
        ("enabled", {"thinking": False}, {"thinking": False}),
        ("enabled", {"enable_thinking": False}, {"thinking": True, "enable_thinking": False}),
    ],
)
def test_thinking_as_in_deepseeks_api(kind, inside, expected):
    """Whichever says "do not think" wins, here or in the tokenizer."""
    body = chat(thinking={"type": kind}, chat_template_kwargs=inside)
    assert normalize(CHAT, body) == chat(chat_template_kwargs=expected)


@pytest.mark.parametrize("thinking", ["disabled", False, {}, {"type": "off"}, {"type": ["disabled"]}, [1]])
def test_thinking_of_another_form(thinking):
    with pytest.raises(ValueError, match=r'^thinking=.+: .+\. Send \{"type": "enabled"\} or \{"type": "disabled"\}\.$'):
        normalize(CHAT, chat(thinking=thinking))


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        (CHAT, {"frobnicate": 1}, "frobnicate=1"),
        (CHAT, {"b": 1, "a": None}, "a=None, b=1"),
        (CHAT, {"prompt": "x"}, "prompt='x'"),
        (COMPLETIONS, {"messages": []}, r"messages=\[\]"),
        (COMPLETIONS, {"thinking": {"type": "disabled"}}, r"thinking=\{.+\}"),
    ],
)
def test_unknown_parameters(path, body, names):
    with pytest.raises(ValueError, match=rf"^{names}: unknown to {path}\. Remove"):
        normalize(path, body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"thinking_token_budget": 2**70},
            r"^thinking_token_budget=1180591620717411303424: has more than 64 bits\. Send",
        ),
        ({"vllm_xargs": {"a": [-(2**63) - 1]}}, r"^vllm_xargs=-9223372036854775809: has more than 64 bits\."),
        (
            {"kv_transfer_params": nested(300)},
            r"^kv_transfer_params=.+: objects and arrays nest deeper than 144 levels\.",
        ),
    ],
    ids=["budget", "inside", "deep"],
)
def test_what_the_engine_cannot_be_sent(body, message):
    """vLLM answers the first two with status 500, and its engine ends with the third."""
    with pytest.raises(ValueError, match=message):
        normalize(CHAT, chat(**body))


def test_numbers_and_depths_that_can_be_sent():
    body = chat(
        seed=2**63 - 1, logit_bias={"5": -(2**63)}, temperature=1e300, kv_transfer_params=nested(143), stop=None
    )
    assert normalize(CHAT, body) == body


# ---- in vLLM's server, whose other middlewares and error handlers are around it


def serve(**options):
    """vLLM's server with one route, which returns the body that it gets and the chunks that it comes in."""
    from starlette.testclient import TestClient
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    app = FastAPI()
    for path in (CHAT, COMPLETIONS, "/v1/responses", "/tokenize"):

        @app.api_route(path, methods=["GET", "POST"])
        async def served(request: Request) -> dict[str, str]:
            return {"served": (await request.body()).decode(errors="replace")}

    options = {
        "allowed_origins": ["*"], "allow_credentials": False, "allowed_methods": ["*"], "allowed_headers": ["*"],
        "api_key": None, "enable_request_id_headers": True, "log_error_stack": False,
        "middleware": ["vllm_deepseek_v4flash.serving.middleware.StrictRequests"],
    } | options  # fmt: skip
    app.state.args = SimpleNamespace(**options)
    init_exception_handler(app)
    init_entrypoints_middleware(app.state.args, app, ())
    return TestClient(app)


@pytest.fixture(scope="module")
def server():
    return serve()


ORIGIN = {"origin": "http://elsewhere"}


def test_a_request_is_passed_on_as_vllm_should_see_it(server):
    body = chat(chat_template_kwargs={"reasoning_effort": "none"}, reasoning_effort="max")
    reply = server.post(CHAT, json=body)
    assert json.loads(reply.json()["served"]) == body | {"reasoning_effort": "none"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"a": "\xff"}', b"[" * 100_000], ids=lambda c: c[:9])
def test_what_is_no_object_is_left_to_vllm(server, content):
    assert server.post(CHAT, content=content).json()["served"] == content.decode(errors="replace")


@pytest.mark.parametrize(("path", "method"), [("/v1/responses", "POST"), (CHAT, "GET"), ("/tokenize", "POST")])
def test_other_requests_are_not_looked_at(server, path, method):
    content = json.dumps(chat(frobnicate=1))
    assert server.request(method, path, content=content).json()["served"] == content


def test_a_refusal_is_an_error_of_the_openai_api(server):
    reply = server.post(CHAT, json=chat(frobnicate=1), headers=ORIGIN)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == 400
    assert error["message"].startswith("frobnicate=1: unknown to /v1/chat/completions. Remove")
    assert reply.headers["access-control-allow-origin"] == "*"
    assert reply.headers["x-request-id"]


def test_the_key_is_checked_first():
    server, right = serve(api_key=["secret"]), {"authorization": "Bearer secret"}
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert server.post(CHAT, json=chat(frobnicate=1), headers=headers).status_code == 401
    assert server.post(CHAT, json=chat(frobnicate=1), headers=right).status_code == 400
    assert server.post(CHAT, json=chat(), headers=right).status_code == 200


def test_a_body_that_is_too_large(server, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_BODY", 1 << 20)
    fits = json.dumps(chat(user="x" * 1_000_000))
    assert server.post(CHAT, content=fits).status_code == 200
    reply = server.post(CHAT, content=json.dumps(chat(user="x" * (1 << 20))), headers=ORIGIN)
    assert reply.status_code == 413
    assert "more than 1 MiB" in reply.json()["error"]["message"]
    assert reply.headers["access-control-allow-origin"] == "*"


# ---- as ASGI


def receive_of(chunks, then):
    """A `receive` of a request whose body comes in chunks, and the list of what is left of it."""
    incoming = [{"type": "http.request", "body": chunk, "more_body": chunk is not chunks[-1]} for chunk in chunks]
    incoming.append(then)

    async def receive():
        return incoming.pop(0)

    return receive, incoming


async def never(message):
    raise AssertionError(message)


async def messages_of(receive, count):
    seen = []

    async def app(scope, receive, send):
        seen.extend([await receive() for _ in range(count)])

    await StrictRequests(app)({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, never)
    return seen


def test_the_end_of_a_request_is_seen():
    end = {"type": "http.disconnect"}
    content = json.dumps(chat()).encode()
    receive, _ = receive_of([content[:5], content[5:9], content[9:]], end)
    request, last = asyncio.run(messages_of(receive, 2))
    assert (json.loads(request["body"]), request["more_body"], last) == (chat(), False, end)


def test_a_client_that_hangs_up_while_it_sends():
    end = {"type": "http.disconnect"}
    incoming = [{"type": "http.request", "body": b"{", "more_body": True}, end]

    async def receive():
        return incoming.pop(0)

    assert asyncio.run(messages_of(receive, 1)) == [end]


def test_no_more_is_read_than_the_limit(monkeypatch):
    """And nothing is passed on."""
    monkeypatch.setattr(middleware, "MAX_BODY", 10)
    receive, incoming = receive_of([b"12345"] * 2 + [b"x"] * 100, {"type": "http.disconnect"})
    with pytest.raises(HTTPException, match="body=11 bytes: more than 0 MiB"):
        asyncio.run(messages_of(receive, 1))
    assert len(incoming) == 100


class Chunk(bytes):
    """Counts the bytes that are copied by adding chunks up."""

    copied = 0

    def __radd__(self, other):
        Chunk.copied += len(other) + len(self)
        return Chunk(bytes(other) + bytes(self))

    def __add__(self, other):
        return Chunk.__radd__(other, self)


def test_the_chunks_of_a_body_are_joined_once():
    content = json.dumps(chat(user="x" * 10_000)).encode()
    chunks = [Chunk(content[start : start + 8]) for start in range(0, len(content), 8)]
    receive, _ = receive_of(chunks, {"type": "http.disconnect"})
    (request,) = asyncio.run(messages_of(receive, 1))
    assert json.loads(request["body"])["user"] == "x" * 10_000
    assert Chunk.copied == 0


EXIT = """
import asyncio, atexit, sys
from types import SimpleNamespace
from vllm_deepseek_v4flash.serving.middleware import FailWithEngine

async def app(scope, receive, send):
    await receive()

async def receive():
    return {"type": "lifespan.shutdown"}

async def serve():
    state = SimpleNamespace(engine_client=SimpleNamespace(errored=sys.argv[1] == "dead"))
    await FailWithEngine(app)({"type": "lifespan", "app": SimpleNamespace(state=state)}, receive, None)

async def after_a_signal():
    await serve()

atexit.register(print, "atexit")
asyncio.run(serve() if sys.argv[2] == "by itself" else after_a_signal())
print("main")
"""


@pytest.mark.parametrize(
    ("engine", "end", "status"),
    [("dead", "by itself", 1), ("alive", "by itself", 0), ("dead", "after a signal", 0)],
)
def test_the_exit_status_is_the_engines(engine, end, status):
    """And everything that a process does at its end is done."""
    done = subprocess.run(
        [sys.executable, "-c", EXIT, engine, end], capture_output=True, text=True, check=False, timeout=1200
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "main\natexit\n", "")


def test_only_the_end_of_the_server_is_looked_at():
    seen = []

    async def app(scope, receive, send):
        seen.append(await receive())

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        raise AssertionError(message)

    scope = {"type": "lifespan", "app": SimpleNamespace(state=SimpleNamespace())}
    asyncio.run(FailWithEngine(app)(scope, receive, send))
    assert seen == [{"type": "lifespan.startup"}]
