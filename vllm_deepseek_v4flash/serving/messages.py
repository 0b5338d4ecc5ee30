"""Chat messages as clients send them, checked and reduced to the turns that V4's format knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Turns of a conversation in the form of the OpenAI API.

    A developer message is a system message. Tool results become a user turn, in the order of their calls; user
    messages and tool results that follow each other are one user turn, joined by a blank line. The content is a
    string or a list of text parts, which are joined the same way (a tool's by a line break), and None only from the
    assistant, whose reasoning is `reasoning` or `reasoning_content`.

    Raises:
        ValueError: the message (by its index), what is wrong with it, and what is allowed.
    """
    if not messages:
        raise ValueError("messages is empty; a conversation needs at least one message.")
    turns: list[Turn] = []
    results: list[tuple[int, str]] = []  # (rank of the call, text) of the tool messages since the last call
    pending: list[Call] = []
    parts: list[str | None] = []  # of the user turn being read; None stands for a tool result
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
    """Move what was read of a user turn to `turns`: texts keep their places, results share theirs by call order."""
    if not parts:
        return
    ordered = iter([text for _, text in sorted(results, key=lambda result: result[0])])
    turns.append(Turn("user", "\n\n".join(next(ordered) if part is None else part for part in parts)))
    parts.clear()
    results.clear()


def _role(index: int, message: Any) -> str:
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}] is {message!r}; it must be an object with a role and a content.")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"messages[{index}].role is {role!r}; it must be one of {', '.join(ROLES)}.")
    for key, mend in (("tools", "pass the request's tools"), ("task", "leave it out")):
        if message.get(key):
            raise ValueError(f"messages[{index}].{key} is not part of the chat API that is served here: {mend}.")
    return str(role)


def _text(index: int, message: Mapping[str, Any], optional: bool) -> str:
    content = message.get("content")
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"messages[{index}].content is {content!r}; it must be a string or a list of text parts.")
    # vLLM joins the parts of a tool's result by one line break before they come here from a server.
    return ("\n" if message["role"] == "tool" else "\n\n").join(_part(index, part) for part in content)


def _part(index: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise ValueError(
        f"messages[{index}].content has a part of type {kind!r}; this model reads text only: "
        f'{{"type": "text", "text": ...}}.'
    )


def _reasoning(index: int, message: Mapping[str, Any]) -> str:
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if not isinstance(reasoning, str | None):
        raise ValueError(f"messages[{index}].reasoning is {reasoning!r}; it must be a string.")
    return reasoning or ""


def _calls(index: int, message: Mapping[str, Any]) -> list[Call]:
    return [
        _call(f"messages[{index}].tool_calls[{number}]", call)
        for number, call in enumerate(message.get("tool_calls") or ())
    ]


def _call(where: str, call: Any) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {call!r}; it needs a function with a name and arguments.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValueError(f"{where}.function.arguments is not JSON ({error}): {arguments!r}.") from error
    if not isinstance(arguments, Mapping | None):
        raise ValueError(f"{where}.function.arguments is {arguments!r}; it must be a JSON object.")
    return Call(call.get("id"), function["name"], arguments or {})


def _rank(index: int, message: Mapping[str, Any], pending: Sequence[Call], position: int) -> int:
    """The place of the call that a tool message answers; without ids, that of the message among its like."""
    call_id = message.get("tool_call_id")
    ids = [call.id for call in pending]
    if not ids:
        raise ValueError(
            f"messages[{index}] is a tool result (tool_call_id {call_id!r}) that no call precedes: it must follow an "
            f"assistant message with tool_calls."
        )
    if not call_id or not any(ids):
        return position
    if call_id not in ids:
        raise ValueError(
            f"messages[{index}].tool_call_id is {call_id!r}; the calls before it are {', '.join(map(repr, ids))}."
        )
    return ids.index(call_id)
