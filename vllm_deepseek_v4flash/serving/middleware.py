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

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
THINKING = {"enabled": True, "disabled": False}


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
        ValueError: for parameters that vLLM would ignore, or a `thinking` of another form.
    """
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


class StrictRequests:
    """Answers requests that have unknown parameters with status 400, and normalizes the others (`normalize`)."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in (CHAT, COMPLETIONS):
            await self.app(scope, receive, send)
            return
        content = await _read_body(receive)
        if content is None:
            return  # the client has disconnected
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        # vLLM itself refuses what is not a JSON object.
        if isinstance(body, dict):
            try:
                content = json.dumps(normalize(path, body)).encode()
            except ValueError as error:
                await _refuse(send, str(error))
                return
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(content)).encode())]}
        await self.app(scope, _replay_body(content, receive), send)


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body of a request; None if the client disconnects before its end."""
    content = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        content += message.get("body", b"")
        if not message.get("more_body"):
            return content


def _replay_body(content: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body, and then the messages that follow it, such as a disconnect."""
    unread: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive_again() -> Message:
        return unread.pop() if unread else await receive()

    return receive_again


async def _refuse(send: Send, reason: str) -> None:
    error = {"message": reason, "type": "BadRequestError", "param": None, "code": 400}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": content})


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
