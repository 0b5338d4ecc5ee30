"""Checked look-ups in a config, and the error for a value that is not supported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .text import shown

_MISSING = object()
LARGEST = 2**31 - 1
"""Of the integers in a config: sizes and positions are 32 bits wide in vLLM and in kernels."""


class Source:
    """A mapping, or an object with the keys as attributes; JSON null and an absent key are the same."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def get(self, name: str, default: Any = None) -> Any:
        if isinstance(self._raw, Mapping):
            value = self._raw.get(name)
        else:
            value = getattr(self._raw, name, None)
        return default if value is None else value

    def integer(self, name: str, default: Any = _MISSING, *, minimum: int = 1) -> int:
        value = self.get(name, default)
        if value is _MISSING:
            raise config_error(name, None, f"must be an integer >= {minimum}, and the key is missing")
        return as_integer(name, value, minimum)

    def positive(self, name: str, default: float) -> float:
        return as_positive(name, self.get(name, default))

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise config_error(name, value, "must be true or false")
        return value

    def string(self, name: str, default: str | None) -> str | None:
        value = self.get(name, default)
        if value is not None and not isinstance(value, str):
            raise config_error(name, value, "must be a string or null")
        return value


def config_error(name: str, value: Any, why: str, fix: str = "Correct it in the model's config.json") -> ValueError:
    return ValueError(f"{name}={shown(value)}: {why}. {fix}.")


def as_integer(name: str, value: Any, minimum: int = 1) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < minimum:
        raise config_error(name, value, f"must be an integer >= {minimum}")
    if value > LARGEST:
        raise config_error(name, value, f"must be an integer up to {LARGEST}")
    return int(value)


def as_positive(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        # An integer may be too large for a float.
        number = number and math.isfinite(value) and value > 0
    except OverflowError:
        number = False
    if not number:
        raise config_error(name, value, "must be a finite number > 0")
    return float(value)


def as_list(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise config_error(name, value, "must be a list with one entry for each layer")
    return list(value)
