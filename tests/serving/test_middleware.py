"""The middlewares without a server: what they refuse, change and pass. test_limits.py and test_soak.py serve them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

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


# ---- as ASGI


def post(content, path=CHAT, method="POST", chunk=7, then=None):
    """`(what the application read, what came back)` of a request whose body comes in chunks."""
    parts = [content[start : start + chunk] for start in range(0, len(content), chunk)] or [b""]
    incoming = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
    incoming += [then or {"type": "http.disconnect"}]
    read, sent = [], []

    async def app(scope, receive, send):
        read.append(scope)
        while not read[1:] or read[-1]["type"] != "http.disconnect":
            read.append(await receive())

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(StrictRequests(app)(scope, receive, send))
    return read, sent


def test_a_request_is_passed_on_and_its_end_is_seen():
    body = chat(chat_template_kwargs={"reasoning_effort": "none"}, reasoning_effort="max")
    (scope, request, end), sent = post(json.dumps(body).encode())
    assert json.loads(request["body"]) == body | {"reasoning_effort": "none"}
    assert not request["more_body"]
    assert dict(scope["headers"]) == {
        b"content-type": b"application/json", b"content-length": str(len(request["body"])).encode(),
    }  # fmt: skip
    assert end == {"type": "http.disconnect"}
    assert sent == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"a": "\xff"}', b"[" * 100_000], ids=lambda c: c[:9])
def test_what_is_no_object_is_left_to_vllm(content):
    (_, request, _), sent = post(content, chunk=50_000)
    assert request["body"] == content
    assert sent == []


def test_a_refusal_is_an_error_of_the_openai_api():
    read, (start, end) = post(json.dumps(chat(frobnicate=1)).encode())
    assert read == []
    assert start["status"] == 400
    assert dict(start["headers"])[b"content-length"] == str(len(end["body"])).encode()
    error = json.loads(end["body"])["error"]
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert error["message"].startswith("frobnicate=1: unknown to /v1/chat/completions. Remove")


def test_a_client_that_hangs_up_while_it_sends():
    read, sent = post(b"", then={"type": "http.disconnect"}, chunk=1)
    assert [message["type"] for message in read[1:]] == ["http.request", "http.disconnect"]

    async def gone():
        return {"type": "http.disconnect"}

    async def never(*arguments):
        raise AssertionError(arguments)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(StrictRequests(never)(scope, gone, never))
    assert sent == []


@pytest.mark.parametrize(("path", "method"), [("/v1/responses", "POST"), (CHAT, "GET"), ("/tokenize", "POST")])
def test_other_requests_are_not_looked_at(path, method):
    content = json.dumps(chat(frobnicate=1)).encode()
    read, sent = post(content, path, method)
    assert b"".join(message.get("body", b"") for message in read[1:]) == content
    assert sent == []


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
