"""ASGI middlewares, which an operator adds with a flag, for two things that vLLM's server passes over silently:

    vllm serve DIR --middleware vllm_deepseek_v4flash.serving.middleware.StrictRequests \\
        --middleware vllm_deepseek_v4flash.serving.middleware.FailWithEngine

They cannot be on by default: vLLM gives a plugin access neither to a request before its defaults are merged nor to the
exit status.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import reprlib
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

from .nesting import MAX_NESTING, TooDeepError, check_nesting

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
THINKING = {"enabled": True, "disabled": False}
# Bytes of a request. A context of 1M tokens takes 10 MB where every character is escaped.
MAX_BODY = 64 << 20
# Deeper values can end vLLM's engine. A request's own objects take a few levels around a tool's schema.
MAX_BODY_NESTING = MAX_NESTING + 16


@functools.cache
def known_parameters(path: str) -> frozenset[str]:
    """The parameters that vLLM reads at `path`, and for chats the `thinking` of DeepSeek's hosted API."""
    from .compat import ChatCompletionRequest, CompletionRequest

    fields = (ChatCompletionRequest if path == CHAT else CompletionRequest).model_fields
    aliases = {field.alias for field in fields.values() if field.alias}
    return frozenset({*fields, *aliases} | ({"thinking"} if path == CHAT else set()))


def normalize(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The request as vLLM should see it.

    The `thinking: {"type": "disabled"}` of DeepSeek's hosted API becomes vLLM's switch. Of two different efforts "none"
    wins, even in `chat_template_kwargs`, where vLLM would drop it.

    Raises:
        ValueError: for parameters that vLLM would ignore, a `thinking` of another form, numbers that are too large, and
            values that nest too deeply.
    """
    for name, value in body.items():
        _check_size(name, value)
    unknown = sorted(body.keys() - known_parameters(path))
    if unknown:
        listed = ", ".join(f"{name}={reprlib.repr(body[name])}" for name in unknown)
        raise ValueError(f"{listed}: unknown to {path}. Remove what is unknown from the request.")
    if path != CHAT:
        return body
    body = dict(body)
    thinking, inside = body.pop("thinking", None), body.get("chat_template_kwargs") or {}
    if not isinstance(inside, dict):
        return body  # vLLM refuses it
    if thinking is not None:
        kind = thinking.get("type") if isinstance(thinking, dict) else None
        if not isinstance(kind, str) or kind not in THINKING:
            raise ValueError(
                f"thinking={reprlib.repr(thinking)}: unsupported form. "
                f'Send {{"type": "enabled"}} or {{"type": "disabled"}}.'
            )
        # An explicit "do not think" in chat_template_kwargs is kept.
        switch = THINKING[kind] and inside.get("thinking") is not False
        body["chat_template_kwargs"] = inside = {**inside, "thinking": switch}
    if inside.get("reasoning_effort") == "none":
        body["reasoning_effort"] = "none"
    return body


def _check_size(name: str, value: Any) -> None:
    """Refuse what vLLM's engine cannot be sent: integers of more than 64 bits and values that nest too deeply."""
    try:
        check_nesting(value, MAX_BODY_NESTING)
    except TooDeepError as error:
        raise ValueError(f"{name}={reprlib.repr(value)}: {error}. Send a flatter value.") from error
    level = [value]
    while level:
        for number in level:
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"{name}={reprlib.repr(number)}: has more than 64 bits. Send a smaller number.")
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]


class StrictRequests:
    """Answers requests that vLLM would ignore a part of with status 400, and normalizes the others (`normalize`).

    A body is read and judged when the server asks for it, so after its check of the API key, and the answer passes
    through its other middlewares, which add the CORS headers. A body above MAX_BODY gets status 413.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and scope["method"] == "POST" and path in (CHAT, COMPLETIONS):
            receive = _Body(path, receive)
        await self.app(scope, receive, send)


class _Body:
    """A `receive` whose first message is the whole body, normalized; later ones, such as a disconnect, follow it."""

    def __init__(self, path: str, receive: Receive) -> None:
        self.path, self.receive = path, receive
        self.is_read = False

    async def __call__(self) -> Message:
        if self.is_read:
            return await self.receive()
        parts, size = [], 0
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                return message  # the client has disconnected
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise HTTPException(
                    413,
                    f"body={size} bytes: more than {MAX_BODY >> 20} MiB. Send the request's texts in several requests.",
                )
            if not message.get("more_body"):
                self.is_read = True
                return {"type": "http.request", "body": _judge(self.path, b"".join(parts)), "more_body": False}


def _judge(path: str, content: bytes) -> bytes:
    """The body as vLLM should see it. What is not a JSON object is left to vLLM, which refuses it.

    Raises:
        HTTPException: status 400, for what `normalize` refuses.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(body, dict):
        return content
    try:
        return json.dumps(normalize(path, body)).encode()
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


class FailWithEngine:
    """Sets the exit status of a server whose engine has died to 1; vLLM ends such a server with status 0."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def receive_and_look() -> Message:
            message = await receive()
            if (
                message["type"] == "lifespan.shutdown"
                and not _ended_by_signal()
                and scope["app"].state.engine_client.errored
            ):
                threading.Thread(target=_exit_after_main_thread, name="exit status").start()
            return message

        await self.app(scope, receive_and_look if scope["type"] == "lifespan" else receive, send)


def _ended_by_signal() -> bool:
    """Whether a signal ends the server: vLLM then cancels uvicorn's `serve` before the application is told."""
    return all(getattr(task.get_coro(), "__name__", "") != "serve" for task in asyncio.all_tasks())


def _exit_after_main_thread() -> None:
    """End the process with status 1 once its main thread has finished, including the shutdown of the engine.

    By then Python has set the status and offers no other way to change it. What it would do next is done here.
    """
    threading.main_thread().join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
