"""vLLM's renderer for V4, given what vLLM's own reading of the messages would drop or fail on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .compat import DeepseekV4Renderer
from .messages import check_arguments, is_continued


class V4Renderer(DeepseekV4Renderer):
    """Makes prompts for the server's APIs, /tokenize and `LLM.chat`.

    `reasoning_content` is `reasoning` for all of them, a last message with DeepSeek's `"prefix": true` is continued,
    and the arguments of calls are checked before vLLM parses them.
    """

    def render_messages(self, messages: Any, params: Any) -> Any:
        return super().render_messages(*prepare(messages, params))

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        return await super().render_messages_async(*prepare(messages, params))


def prepare(messages: Sequence[Any], params: Any) -> tuple[list[Any], Any]:
    """`(messages, params)` as vLLM understands them.

    Args:
        params: vLLM's ChatParams.

    Raises:
        ValueError: naming the message by its index, what is wrong with it, and the fix.
    """
    check_arguments(messages)
    if is_continued(messages):
        switches = {"add_generation_prompt": False, "continue_final_message": True}
        params = dataclasses.replace(params, chat_template_kwargs={**params.chat_template_kwargs, **switches})
    return [_with_reasoning(message) for message in messages], params


def _with_reasoning(message: Any) -> Any:
    if not isinstance(message, Mapping) or message.get("reasoning") is not None:
        return message
    return {**message, "reasoning": message.get("reasoning_content")}
