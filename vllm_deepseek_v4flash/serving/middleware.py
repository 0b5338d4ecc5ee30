"""What vLLM's server does in silence and should not, as ASGI middlewares that an operator adds by a flag:

    vllm serve DIR --middleware vllm_deepseek_v4flash.serving.middleware.StrictRequests \\
        --middleware vllm_deepseek_v4flash.serving.middleware.FailWithEngine

vLLM shows a plugin neither a request before it is merged nor its exit status, so that none of this can be on by itself.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
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
    """What vLLM reads of a request to `path`, and of a chat the `thinking` of DeepSeek's hosted API."""
    from vllm_deepseek_v4flash.serving.compat import ChatCompletionRequest, CompletionRequest

    fields = (ChatCompletionRequest if path == CHAT else CompletionRequest).model_fields
    aliases = {field.alias for field in fields.values() if field.alias}
    return frozenset({*fields, *aliases} | ({"thinking"} if path == CHAT else set()))


def settle(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The request as vLLM should see it.

    `thinking: {"type": "disabled"}`, as DeepSeek's hosted API has it, becomes vLLM's switch, and of two efforts that
    differ "none" wins, where vLLM drops the one in `chat_template_kwargs`.

    Raises:
        ValueError: parameters that vLLM would ignore, or a `thinking` of another form.
    """
    unknown = sorted(body.keys() - known_parameters(path))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a parameter of {path}. Leave out what is not known here.")
    if path != CHAT:
        return body
    body = dict(body)
    thinking, inside = body.pop("thinking", None), body.get("chat_template_kwargs") or {}
    if not isinstance(inside, dict):
        return body  # vLLM says what is wrong with it
    if thinking is not None:
        kind = thinking.get("type") if isinstance(thinking, dict) else None
        if not isinstance(kind, str) or kind not in THINKING:
            raise ValueError(f'thinking is {thinking!r}; it must be {{"type": "enabled"}} or {{"type": "disabled"}}.')
        # An explicit "do not think" inside stays.
        switch = THINKING[kind] and inside.get("thinking") is not False
        body["chat_template_kwargs"] = inside = {**inside, "thinking": switch}
    if inside.get("reasoning_effort") == "none":
        body["reasoning_effort"] = "none"
    return body


class StrictRequests:
    """Answers requests with unknown parameters with status 400, and settles the switches of others (`settle`)."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in (CHAT, COMPLETIONS):
            await self.app(scope, receive, send)
            return
        content = await _read(receive)
        if content is None:
            return  # the client has hung up
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        # What is no JSON object is vLLM's to refuse.
        if isinstance(body, dict):
            try:
                content = json.dumps(settle(path, body)).encode()
            except ValueError as error:
                await _refuse(send, str(error))
                return
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(content)).encode())]}
        await self.app(scope, _again(content, receive), send)


async def _read(receive: Receive) -> bytes | None:
    """The whole body of a request; None where it is broken off."""
    content = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        content += message.get("body", b"")
        if not message.get("more_body"):
            return content


def _again(content: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what comes behind it: that the client hangs up."""
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
    """Makes 1 of the exit status of a server whose engine has died; vLLM ends such a server with status 0."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def receive_and_look() -> Message:
            message = await receive()
            if (
                message["type"] == "lifespan.shutdown"
                and _ends_by_itself()
                and scope["app"].state.engine_client.errored
            ):
                threading.Thread(target=_exit_behind_the_main_thread, name="exit status").start()
            return message

        await self.app(scope, receive_and_look if scope["type"] == "lifespan" else receive, send)


def _ends_by_itself() -> bool:
    """Not by a signal, on which vLLM ends the engine and cancels uvicorn's `serve` before the application is told."""
    return any(getattr(task.get_coro(), "__name__", "") == "serve" for task in asyncio.all_tasks())


def _exit_behind_the_main_thread() -> None:
    """End the process with status 1 once its main thread has done all it does, the engine's end included.

    Python has set the status by then, and offers no other way to change it. What it would do next is done here.
    """
    threading.main_thread().join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
