"""Chat messages and tools, as short as a test can write them."""

from __future__ import annotations

from typing import Any


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": call_id}


def nested(depth: int) -> dict[str, Any]:
    """Objects in objects: {"a": {"a": ... {}}}, `depth` levels around an empty one."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def tool(name: str, description: str | None = None, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
