"""The module from which vLLM's API server loads the tool parser, and what its chat API says of a call that is cut off.

vLLM 0.32 and 0.33 answer a chat that is not streamed with the finish_reason "tool_calls" whenever there is a call, also
where `max_tokens` or a stop string cut it off; streamed, only the stop string is missed. A plugin sees neither the
finish reason in the parser nor the reply anywhere else, so this wraps the two methods that make replies. Can go once
`test_stock_calls_a_cut_call_complete` fails.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

from ..serving.parsers import V4ToolParser, ends_in_call

__all__ = ["V4ToolParser", "report_cut_calls"]

CALLED = "tool_calls"
_MARK = "vllm_deepseek_v4flash_reports_cut_calls"


@dataclass
class _Reply:
    """What the engine has generated for one choice."""

    parts: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None

    def finish_reason_of_calls(self) -> str:
        """What OpenAI's API says of a reply that has a call: how it was cut off, or "tool_calls"."""
        stopped = isinstance(self.stop_reason, str) and ends_in_call("".join(self.parts))
        return self.finish_reason if self.finish_reason and (self.finish_reason != "stop" or stopped) else CALLED


def report_cut_calls(server: Any = OpenAIServingChat) -> None:
    """Make the finish_reason of a cut-off call that of the engine, streamed or not. Idempotent."""
    if _MARK in vars(server):
        return
    full, stream = server.chat_completion_full_generator, server.chat_completion_stream_generator

    @functools.wraps(full)
    async def full_generator(self: Any, request: Any, results: AsyncIterator[Any], *args: Any, **kwargs: Any) -> Any:
        replies: dict[int, _Reply] = {}
        response = await full(self, request, _watch(results, replies), *args, **kwargs)
        if isinstance(response, ChatCompletionResponse):
            for choice in response.choices:
                if choice.finish_reason == CALLED:
                    choice.finish_reason = replies[choice.index].finish_reason_of_calls()
        return response

    @functools.wraps(stream)
    async def stream_generator(self: Any, request: Any, results: AsyncIterator[Any], *args: Any, **kwargs: Any) -> Any:
        replies: dict[int, _Reply] = {}
        async with contextlib.aclosing(stream(self, request, _watch(results, replies), *args, **kwargs)) as events:
            async for event in events:
                yield _correct(event, replies)

    server.chat_completion_full_generator = full_generator
    server.chat_completion_stream_generator = stream_generator
    setattr(server, _MARK, True)


async def _watch(results: AsyncIterator[Any], replies: dict[int, _Reply]) -> AsyncIterator[Any]:
    """The engine's results, kept in `replies` by the choice's index. Those of a stream are deltas."""
    async for result in results:
        for output in result.outputs:
            reply = replies.setdefault(output.index, _Reply())
            reply.parts.append(output.text)
            reply.finish_reason, reply.stop_reason = output.finish_reason, output.stop_reason
        yield result


def _correct(event: str, replies: dict[int, _Reply]) -> str:
    """A server-sent event of a chat, with the finish_reason of its calls."""
    # Quotes inside a JSON string are escaped, so only the field itself matches.
    if f'"finish_reason":"{CALLED}"' not in event:
        return event
    chunk = json.loads(event.removeprefix("data: "))
    for choice in chunk["choices"]:
        if choice.get("finish_reason") == CALLED:
            choice["finish_reason"] = replies[choice["index"]].finish_reason_of_calls()
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


report_cut_calls()
