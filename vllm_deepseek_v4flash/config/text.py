"""What a file holds, as messages may show it: on one line, short, and without anything that a terminal obeys."""

from __future__ import annotations

import json
from typing import Any

_LONGEST, _LONGEST_LINE = 200, 700


def printable(text: str) -> str:
    """`text` with control characters, line breaks, lone surrogates and reordering marks as escape sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def line(text: str) -> str:
    """`text` as one line of a list: printable, and cut where it is long."""
    text = printable(text)
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}..."


def shown(value: Any) -> str:
    """`repr(value)` for a message: printable, and cut where it is long."""
    try:
        text = printable(repr(value))
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    except ValueError:
        # Python writes no integers of thousands of digits.
        return f"a {type(value).__name__} with a number too long to print"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested more deeply than Python reads; the message says where or what.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from error
