"""The regular expressions of a checkpoint's config, which must not hold up whoever reads it.

Python's `re` backtracks, so a short pattern can take hours on one name. What a pattern can cost is estimated from its
parts before it is used, and the time that all patterns of a config take together is limited.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from ...ops.packed_weight import QuantizationError

# What one match may take: about ten seconds, for a pattern that is made to be slow.
_MAX_STEPS = 1e9
# The longest module name of any spelling is shorter.
_NAME_LENGTH = 90
# How far a repeated digit or letter can reach in a module's name, in steps.
_RUN_LENGTH = 3
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_MAX_SECONDS = 20.0


class PatternError(QuantizationError):
    """A pattern that no module can be compared with."""


class _Clock:
    """The seconds that this process has spent matching since the last survey began."""

    spent = 0.0


def restart_clock() -> None:
    """Begin a survey: its patterns have all of the time again."""
    _Clock.spent = 0.0


@dataclass(frozen=True)
class Rule:
    """A compiled pattern, and a text that every name it matches contains."""

    compiled: re.Pattern[str]
    needed: str

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of a match.

        Raises:
            PatternError: the matches of this survey have used up theirs.
        """
        if _Clock.spent > _MAX_SECONDS:
            raise PatternError(
                f"quantization_config holds regular expressions that take more than {_MAX_SECONDS:g} s to compare with "
                f"the modules' names, the last of them {self.compiled.pattern!r}. Replace them by names of modules, or "
                "by expressions with fewer repeats."
            )
        start = time.perf_counter()
        try:
            yield
        finally:
            _Clock.spent += time.perf_counter() - start


@lru_cache(maxsize=4096)
def rule(pattern: str) -> Rule:
    """A pattern, ready to be used.

    Raises:
        PatternError: it is not a regular expression, or one that can take very long.
    """
    try:
        compiled = re.compile(pattern)
        # The parser of `re` itself, so that what is estimated is what runs.
        parsed = import_module("re._parser").parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(
            f"quantization_config holds {pattern!r}, which is not a regular expression: {error}. Correct it."
        ) from error
    wide, narrow = _repeats(parsed, pattern)
    # A search tries every start.
    if math.comb(_NAME_LENGTH + wide + 1, wide + 1) * _RUN_LENGTH**narrow > _MAX_STEPS:
        raise _too_slow(pattern, f"it repeats {wide + narrow} things")
    ignores_case = bool(compiled.flags & re.IGNORECASE)
    return Rule(compiled, "" if ignores_case else _needed(parsed))


def _too_slow(pattern: str, why: str) -> PatternError:
    return PatternError(
        f"quantization_config holds the regular expression {pattern!r}, which can take very long on a module's name: "
        f"{why}. Replace it by names of modules, or by an expression with fewer repeats."
    )


def _repeats(parsed: Any, pattern: str) -> tuple[int, int]:
    """How many parts can match texts of several lengths: any text, and a digit or letter only.

    Raises:
        PatternError: one contains another, or alternatives, and so can match one text in very many ways.
    """
    wide = narrow = 0
    for operation, argument in parsed:
        name = str(operation)
        if name in _REPEATS:
            low, high, body = argument
            inner = _repeats(body, pattern)
            if high > 1 and (sum(inner) or _has_alternatives(body)):
                raise _too_slow(pattern, "it repeats what already repeats or has alternatives")
            more = (0, 0) if low == high else (1, 0) if high > 1 and _is_wide(body) else (0, 1)
            wide, narrow = wide + inner[0] + more[0], narrow + inner[1] + more[1]
            continue
        for body in _bodies(name, argument):
            inner = _repeats(body, pattern)
            wide, narrow = wide + inner[0], narrow + inner[1]
    return wide, narrow


def _has_alternatives(parsed: Any) -> bool:
    return any(
        str(operation) == "BRANCH" or any(map(_has_alternatives, _bodies(str(operation), argument)))
        for operation, argument in parsed
    )


def _bodies(name: str, argument: Any) -> list[Any]:
    """The patterns that one operation contains."""
    if name == "BRANCH":
        return list(argument[1])
    if name == "SUBPATTERN":
        return [argument[3]]
    if name in ("ASSERT", "ASSERT_NOT"):
        return [argument[1]]
    if name == "ATOMIC_GROUP":
        return [argument]
    return [body for body in argument[1:] if body is not None] if name == "GROUPREF_EXISTS" else []


def _is_wide(body: Any) -> bool:
    """Whether a repeated part matches more than one letter, or digits."""
    if len(body) != 1:
        return True
    operation, argument = body[0]
    if str(operation) == "IN":
        return not all(str(kind) == "CATEGORY" and str(value) == "CATEGORY_DIGIT" for kind, value in argument)
    return str(operation) != "LITERAL"


def _needed(parsed: Any) -> str:
    """The longest text that stands in the pattern as it is, outside any group."""
    runs = [""]
    for operation, argument in parsed:
        if str(operation) == "LITERAL":
            runs[-1] += chr(argument)
        else:
            runs.append("")
    return max(runs, key=len)
