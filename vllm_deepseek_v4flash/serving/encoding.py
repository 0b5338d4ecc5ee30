"""V4's chat format: from messages in the form of the OpenAI API to the text of the prompt.

    BOS [mode's text] system [tools] [response format] <User>user<Assistant><think>reasoning</think>answer EOS <User>...

The system text has no role token. Tool results are user turns. The format is that of the encoders that DeepSeek ships
with the weights (`encoding/` in the repositories); the two generations differ only in their reasoning modes.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from .messages import Turn, is_continued, read_messages
from .modes import Mode
from .nesting import TooDeepError, check_nesting

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

# DeepSeek's exact wording, on which the weights were trained.
_TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

%s

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n%s"


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    mode: Mode,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
    drop_thinking: bool = True,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The text of the prompt for a conversation.

    Args:
        messages: in the form of the OpenAI API; see `messages.read_messages`.
        mode: the request's reasoning mode, which also decides the token that opens the answer.
        tools: in the form of the OpenAI API, or their bare `function` objects.
        response_format: a JSON schema to show to the model, after the system text.
        drop_thinking: leave out the reasoning of turns before the last user turn. With tools it is always kept, because
            the model continues its reasoning across calls.
        add_generation_prompt: end with the token that opens the answer, also after an assistant's message.
        continue_final_message: leave the last message, an assistant's, open so that the model continues it; the same
            as DeepSeek's `"prefix": true` in that message.

    Raises:
        ValueError: naming what is wrong with the messages or the tools, and the fix.
    """
    turns = read_messages(messages)
    continue_final_message = continue_final_message or is_continued(messages)
    last_is_assistant = turns[-1].role == "assistant"
    if continue_final_message and not last_is_assistant:
        raise ValueError(
            f"continue_final_message=True: the last message is the {turns[-1].role}'s, and only the assistant's can be "
            f"continued. End with an assistant message, or leave continue_final_message out."
        )
    _attach_to_system(turns, tools, response_format)
    keep_thinking = mode.thinking and (not drop_thinking or bool(tools))
    last_user = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=-1)

    text = BOS + mode.text
    for index, turn in enumerate(turns):
        following = turns[index + 1].role if index + 1 < len(turns) else None
        thinks = mode.thinking and (keep_thinking or index >= last_user)
        if turn.role == "assistant":
            text += _answer(turn, thinks)
            text += "" if continue_final_message and following is None else EOS
            if following is None and add_generation_prompt and not continue_final_message:
                text += ASSISTANT + (THINK if mode.thinking else END_THINK)
            continue
        text += {"user": USER, "latest_reminder": LATEST_REMINDER}.get(turn.role, "") + turn.text
        if _is_answered(turn.role, following, add_generation_prompt):
            text += ASSISTANT + (THINK if thinks else END_THINK)
    return text


def _is_answered(role: str, following: str | None, add_generation_prompt: bool) -> bool:
    """Whether the assistant's token follows this turn; `following` is the next turn's role."""
    if role == "latest_reminder":
        return False
    if following is None:
        return add_generation_prompt
    # DeepSeek's encoders open the answer before a reminder that follows the user's text.
    return following == "assistant" or (role == "user" and following == "latest_reminder")


def _attach_to_system(turns: list[Turn], tools: Sequence[Mapping[str, Any]] | None, response_format: Any) -> None:
    """Append the tools and the response format to the first system turn, inserting one if there is none."""
    if not tools and response_format is None:
        return
    system = next((turn for turn in turns if turn.role == "system"), None)
    if system is None:
        system = Turn("system", "")
        turns.insert(0, system)
    if tools:
        system.text += "\n\n" + _TOOLS % "\n".join(_checked("tools[]", _function(tool)) for tool in tools)
    if response_format is not None:
        system.text += "\n\n" + _RESPONSE_FORMAT % _checked("response_format", response_format)


def _checked(where: str, value: Any) -> str:
    """The JSON of what a request shows to the model."""
    try:
        check_nesting(value)
    except TooDeepError as error:
        raise ValueError(f"{where}={reprlib.repr(value)}: {error}. Use a flatter schema.") from error
    return _json(value)


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What the model sees of a tool: always in the same order, which `LLM.chat` keeps and vLLM's server changes.

    Unset fields are left out; vLLM's server sets them to null.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"tools[]={reprlib.repr(tool)}: has no function with a name. "
            f'Send {{"type": "function", "function": {{"name": ...}}}}.'
        )
    return {name: function[name] for name in _FUNCTION_FIELDS if function.get(name) is not None}


def _answer(turn: Turn, thinks: bool) -> str:
    """An assistant's turn, after the token that opens it."""
    text = (turn.reasoning + END_THINK if thinks else "") + turn.text
    if not turn.calls:
        return text
    # The blank line before the calls belongs to the format; output parsers leave it on the text.
    text = text.removesuffix("\n\n")
    calls = "\n".join(
        f'<{DSML}invoke name="{call.name}">\n{_parameters(call.arguments)}\n</{DSML}invoke>' for call in turn.calls
    )
    return f"{text}\n\n<{DSML}tool_calls>\n{calls}\n</{DSML}tool_calls>"


def _parameters(arguments: Mapping[str, Any]) -> str:
    return "\n".join(
        f'<{DSML}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _json(value)}</{DSML}parameter>"
        for name, value in arguments.items()
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
