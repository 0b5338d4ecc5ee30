"""JSON of a bounded depth: Python's parser and writer recurse, and fail at a depth that depends on the caller's."""

from __future__ import annotations

import json
from typing import Any

# As in serde_json, with which many clients read JSON.
MAX_NESTING = 128


class TooDeepError(ValueError):
    """Objects and arrays nest deeper than a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"objects and arrays nest deeper than {limit} levels")


def load_json(text: str, **options: Any) -> Any:
    """The value of a JSON text; the options are those of `json.loads`.

    Raises:
        ValueError: not JSON.
        TooDeepError: objects and arrays nest deeper than MAX_NESTING.
    """
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise TooDeepError(MAX_NESTING) from None
    check_nesting(value)
    return value


def check_nesting(value: Any, limit: int = MAX_NESTING) -> None:
    """Refuse a value whose objects and arrays nest deeper than the limit.

    Raises:
        TooDeepError: they do.
    """
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise TooDeepError(limit)
