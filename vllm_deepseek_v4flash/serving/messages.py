"""Chat messages in the form of the OpenAI API, checked and reduced to the turns of V4's format."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .nesting import TooDeepError, check_nesting, load_json

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


@dataclass(frozen=True)
class Call:
    """A tool call of the assistant."""

    id: str | None
    name: str
    arguments: Mapping[str, Any]


@dataclass
class Turn:
    """One turn of the format; `role` is system, user, assistant or latest_reminder."""

    role: str
    text: str
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


def is_continued(messages: Sequence[Any]) -> bool:
    """Whether the last message has the `"prefix": true` of DeepSeek's API: the model then continues it.

    Raises:
        ValueError: for a prefix that is no boolean, or of another role than the assistant's.
    """
    last = messages[-1] if messages else None
    if not isinstance(last, Mapping):
        return False
    prefix, role = last.get("prefix"), last.get("role")
    if not isinstance(prefix, bool | None):
        raise ValueError(f"messages[-1].prefix={reprlib.repr(prefix)}: not a boolean. Use true or false.")
    if prefix and role != "assistant":
        raise ValueError(
            f"messages[-1].prefix=True: the message is the {role}'s, and only the assistant's can be "
            f"continued. End with an assistant message, or leave the prefix out."
        )
    return bool(prefix)


def check_arguments(messages: Sequence[Any]) -> None:
    """Refuse calls whose arguments nest too deeply, which vLLM's server would fail to parse.

    Raises:
        ValueError: naming the call and the fix.
    """
    for index, message in enumerate(messages):
        for number, call in enumerate((isinstance(message, Mapping) and message.get("tool_calls")) or ()):
            function = call.get("function") if isinstance(call, Mapping) else None
            arguments = function.get("arguments") if isinstance(function, Mapping) else None
            try:
                check_nesting(load_json(arguments) if isinstance(arguments, str) else arguments)
            except TooDeepError as error:
                raise _bad_arguments(f"messages[{index}].tool_calls[{number}]", arguments, error) from error
            except ValueError:
                continue  # vLLM's server replaces what is not JSON by {}


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The turns of a conversation.

    A developer message is a system message. Tool results become a user turn, in the order of their calls; consecutive
    user messages and tool results are one user turn, joined by a blank line. The content is a string or a list of text
    parts, which are joined the same way (a tool's by a line break). Only the assistant's may be None; its reasoning is
    `reasoning` or `reasoning_content`.

    Raises:
        ValueError: naming the message by its index, what is wrong with it, and the fix.
    """
    if not messages:
        raise ValueError("messages=[]: a conversation needs a message. Send at least one.")
    turns: list[Turn] = []
    results: list[tuple[int, str]] = []  # (rank of the call, text) of the tool messages since the last call
    pending: list[Call] = []
    parts: list[str | None] = []  # of the user turn being read; None marks the place of a tool result
    for index, message in enumerate(messages):
        role = _role(index, message)
        text = _text(index, message, optional=role == "assistant")
        if role == "tool":
            results.append((_rank(index, message, pending, len(results)), f"<tool_result>{text}</tool_result>"))
            parts.append(None)
            continue
        if role == "user":
            parts.append(text)
            continue
        _close_user_turn(turns, parts, results)
        pending = _calls(index, message) if role == "assistant" else pending
        if role == "assistant":
            turns.append(Turn(role, text, _reasoning(index, message), pending))
        else:
            turns.append(Turn("system" if role == "developer" else role, text))
    _close_user_turn(turns, parts, results)
    return turns


def _close_user_turn(turns: list[Turn], parts: list[str | None], results: list[tuple[int, str]]) -> None:
    """Append the user turn read so far: texts keep their places, results fill theirs in the order of their calls."""
    if not parts:
        return
    ordered = iter([text for _, text in sorted(results, key=lambda result: result[0])])
    turns.append(Turn("user", "\n\n".join(next(ordered) if part is None else part for part in parts)))
    parts.clear()
    results.clear()


def _role(index: int, message: Any) -> str:
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}]={reprlib.repr(message)}: must be an object. Give it a role and a content.")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"messages[{index}].role={reprlib.repr(role)}: unknown role. Use one of {', '.join(ROLES)}.")
    for key, fix in (("tools", "Set the request's tools"), ("task", "Remove it")):
        if message.get(key):
            raise ValueError(
                f"messages[{index}].{key}={reprlib.repr(message[key])}: not part of a message in this API. {fix}."
            )
    return str(role)


def _text(index: int, message: Mapping[str, Any], optional: bool) -> str:
    content = message.get("content")
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(
            f"messages[{index}].content={reprlib.repr(content)}: unsupported type. Send a string or text parts."
        )
    # Separators as in vLLM's server, which joins the parts of a tool's result by one line break before this is called.
    separator = "\n" if message["role"] == "tool" else "\n\n"
    return separator.join(_part(f"messages[{index}].content[{number}]", part) for number, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    # /v1/messages, for Claude Code's search of tools: the result is the name of a tool.
    if isinstance(part, Mapping) and part.get("type") == "tool_reference" and isinstance(part.get("name"), str):
        return str(part["name"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise ValueError(
        f'{where}.type={reprlib.repr(kind)}: this model reads text only. Send {{"type": "text", "text": ...}}.'
    )


def _reasoning(index: int, message: Mapping[str, Any]) -> str:
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if not isinstance(reasoning, str | None):
        raise ValueError(f"messages[{index}].reasoning={reasoning!r}: must be a string. Send it as it was received.")
    return reasoning or ""


def _calls(index: int, message: Mapping[str, Any]) -> list[Call]:
    return [
        _call(f"messages[{index}].tool_calls[{number}]", call)
        for number, call in enumerate(message.get("tool_calls") or ())
    ]


def _call(where: str, call: Any) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"{where}={reprlib.repr(call)}: has no function with a name. Send the call as it was received."
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise _bad_arguments(where, arguments, error) from error
    if not isinstance(arguments, Mapping | None):
        raise ValueError(
            f"{where}.function.arguments={reprlib.repr(arguments)}: not a JSON object. Send one, or its text."
        )
    return Call(call.get("id"), function["name"], arguments or {})


def _bad_arguments(where: str, arguments: Any, error: ValueError) -> ValueError:
    kind = "too deep" if isinstance(error, TooDeepError) else "not JSON"
    shown = reprlib.repr(arguments)
    return ValueError(f"{where}.function.arguments={shown}: {kind} ({error}). Send the arguments as a JSON object.")


def _rank(index: int, message: Mapping[str, Any], pending: Sequence[Call], position: int) -> int:
    """The index of the call that a tool message answers; without ids, its position among the tool messages."""
    call_id = message.get("tool_call_id")
    ids = [call.id for call in pending]
    if not ids:
        raise ValueError(
            f"messages[{index}].tool_call_id={call_id!r}: no call precedes this tool result. Send it after an "
            f"assistant message with tool_calls."
        )
    if not call_id or not any(ids):
        return position
    if call_id not in ids:
        raise ValueError(
            f"messages[{index}].tool_call_id={call_id!r}: not the id of a call before it. Use one of "
            f"{', '.join(map(repr, ids))}."
        )
    return ids.index(call_id)
