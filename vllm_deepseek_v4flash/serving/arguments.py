"""The arguments of a tool call: from the text of one invoke to their JSON, as it arrives, in linear time."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .compat import coerce_to_schema_type, extract_types_from_schema
from .encoding import DSML
from .nesting import TooDeepError, load_json

# Parameters in which the model sometimes wraps all arguments.
WRAPPERS = frozenset({"arguments", "input"})

_END = f"</{DSML}parameter>"
_START = f"<{DSML}parameter"
_TAG = rf'{_END}|{_START}\s+name="([^"]+)"(?:\s+string="([^"]*)")?\s*>'
# Held text up to this length is searched again with every piece that arrives, a longer one when it has doubled.
_SHORT = 256


def _beginnings(atoms: Sequence[str]) -> str:
    """A pattern of all beginnings of a sequence of patterns, the empty one included."""
    return functools.reduce(lambda rest, atom: f"(?:{atom}{rest})?", reversed(atoms), "")


_FLAG = _beginnings([r"\s+", *'string="', '[^"]*', '"', r"\s*"])
# What further text could make a tag of a parameter, or the end tag of the invoke or of the block.
_BEGUN = "|".join(
    "<" + _beginnings(atoms)
    for atoms in (
        [*_START[1:], r"\s+", *'name="', '[^"]+', '"', _FLAG],
        *([*f"/{DSML}{name}>"] for name in ("parameter", "invoke", "tool_calls")),
    )
)
_COMPLETE = re.compile(_TAG)
_NEXT = re.compile(rf"{_TAG}|(?P<begun>(?:{_BEGUN})\Z)")


@dataclass
class _Parameter:
    """The parameter that is being read."""

    name: str
    is_string: bool
    streams: bool = False
    """Its value is sent as it arrives."""
    repeated: bool = False
    """Another parameter had its name, so its value does not count."""
    parts: list[str] = field(default_factory=list)
    """The value so far, unless it streams."""
    line_break: bool = False
    """A line break at the end of a streamed value is held back: before the next tag it belongs to the format."""


class ArgumentReader:
    """Reads one invoke.

    A parameter whose end tag is missing extends to the next one, or to the end of the invoke. Of several with one name
    the first counts, because it has been streamed by the time another arrives. A body without parameters is the
    arguments themselves, as JSON; anything else becomes the argument `arguments`, so that it is not lost.

    Args:
        properties: the schemas of the tool's parameters, by name; empty if unknown.
    """

    def __init__(self, properties: Mapping[str, Any]) -> None:
        self._properties = properties
        self._parameter: _Parameter | None = None
        self._seen: set[str] = set()
        self._body: list[str] = []  # the text before the first parameter
        # While the only parameters are wrappers they are kept, because arguments inside one replace it.
        self._wrapped: dict[str, Any] | None = {} if properties else None
        self._held: list[str] = []  # text that may be the beginning of a tag
        self._held_length, self._search_at = 0, 1
        self._json: list[str] = []
        self._returned = 0  # how many of those have been returned
        self._finished = False

    @property
    def json(self) -> str:
        """The JSON so far; after `finish` it is complete."""
        return "".join(self._json)

    def read(self, text: str) -> str:
        """The JSON that this piece of the invoke's text adds."""
        self._held.append(text)
        self._held_length += len(text)
        if self._held_length >= self._search_at:
            self._search()
        return self._new()

    def finish(self, closed: bool) -> str:
        """The rest of the JSON, once.

        Args:
            closed: the invoke has its end tag. Without it the last parameter may be cut off: a string is closed where
                it ends, and of other values those are left out that are incomplete, or numbers.
        """
        if self._finished:
            return ""
        self._finished = True
        text, position = "".join(self._held), 0
        for tag in _COMPLETE.finditer(text):
            position = self._pass(text, position, tag)
        begun = None if closed else _NEXT.search(text, position)
        self._take(text[position : begun.start() if begun else len(text)])
        self._end_parameter(tagged=False, complete=closed)
        if not self._seen:
            self._read_body()
        elif self._wrapped is not None:
            self._write_all(unwrap(self._wrapped, self._properties))
        self._json.append("}" if self._json else "{}")
        return self._new()

    def _search(self) -> None:
        """Read the held text up to the beginning of an incomplete tag."""
        text, position, end = "".join(self._held), 0, None
        for tag in _NEXT.finditer(text):
            if tag["begun"] is not None:
                end = tag.start()
                break
            position = self._pass(text, position, tag)
        self._take(text[position:end])
        rest = "" if end is None else text[end:]
        self._held, self._held_length = [rest], len(rest)
        self._search_at = len(rest) + 1 if len(rest) <= _SHORT else 2 * len(rest)

    def _pass(self, text: str, position: int, tag: re.Match[str]) -> int:
        """Read up to a complete tag and the tag itself; the position behind it."""
        self._take(text[position : tag.start()])
        is_end = tag[1] is None
        self._end_parameter(tagged=is_end, complete=True)
        if not is_end:
            self._begin_parameter(tag[1], tag[2] == "true")
        return tag.end()

    def _begin_parameter(self, name: str, is_string: bool) -> None:
        if name in self._seen:
            self._parameter = _Parameter(name, is_string, repeated=True)
            return
        self._seen.add(name)
        if self._wrapped is not None and (name not in WRAPPERS or name in self._properties):
            self._write_all(self._wrapped)
            self._wrapped = None
        types = declared_types(self._properties.get(name))
        streams = is_string and self._wrapped is None and (not types or "string" in types)
        self._parameter = _Parameter(name, is_string, streams)
        if streams:
            self._write_name(name)
            self._json.append('"')

    def _take(self, text: str) -> None:
        """Read text that is no tag."""
        parameter = self._parameter
        if not text:
            return
        if parameter is None:
            if not self._seen:
                self._body.append(text)
        elif not parameter.streams:
            parameter.parts.append(text)
        else:
            text = "\n" + text if parameter.line_break else text
            parameter.line_break = text.endswith("\n")
            self._json.append(_escape(text.removesuffix("\n")))

    def _end_parameter(self, tagged: bool, complete: bool) -> None:
        """End the parameter that is being read, if any.

        Args:
            tagged: by its own tag, and so a line break before it belongs to the value.
            complete: nothing of it is missing.
        """
        parameter, self._parameter = self._parameter, None
        if parameter is None or parameter.repeated:
            return
        if parameter.streams:
            self._json.append(_escape("\n") * (parameter.line_break and tagged) + '"')
            return
        value, schema = "".join(parameter.parts), self._properties.get(parameter.name)
        if not complete and not _is_whole(value, parameter.is_string, schema):
            return
        converted = convert_value(value if tagged else value.removesuffix("\n"), parameter.is_string, schema)
        if self._wrapped is not None:
            self._wrapped[parameter.name] = converted
        else:
            self._write_all({parameter.name: converted})

    def _read_body(self) -> None:
        body = "".join(self._body).strip()
        if not body:
            return
        arguments = _load(body)
        self._write_all(
            unwrap(arguments, self._properties) if isinstance(arguments, dict) else {"arguments": arguments}
        )

    def _write_all(self, arguments: Mapping[str, Any]) -> None:
        for name, value in arguments.items():
            self._write_name(name)
            self._json.append(_dump(value))

    def _write_name(self, name: str) -> None:
        self._json.append(("{" if not self._json else ", ") + _dump(name) + ": ")

    def _new(self) -> str:
        new = "".join(self._json[self._returned :])
        self._returned = len(self._json)
        return new


def convert_value(value: str, is_string: bool, schema: Any) -> Any:
    """A parameter's value in the type that the model declared, unless the tool's schema does not allow that type."""
    types = declared_types(schema)
    if is_string:
        return value if not types or "string" in types else _coerce(value, types)
    try:
        parsed = load_json(value, parse_constant=str, parse_float=_finite)
    except ValueError:
        return value if not types else _coerce(value, types)
    if list(types) == ["string"] and not isinstance(parsed, str):
        return value
    return parsed


def declared_types(schema: Any) -> Sequence[str]:
    """The JSON types that a parameter's schema declares; none if it declares none, such as a `$ref`.

    vLLM treats a schema without a type as a string's.
    """
    if not isinstance(schema, dict) or not any(key in schema for key in ("type", "enum", "anyOf", "oneOf", "allOf")):
        return ()
    return list(extract_types_from_schema(schema))


def unwrap(arguments: dict[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments inside a single parameter `arguments` or `input` that the tool does not have."""
    if len(arguments) != 1 or not arguments.keys() <= WRAPPERS - properties.keys():
        return arguments
    (inner,) = arguments.values()
    inner = _load(inner) if isinstance(inner, str) else inner
    return inner if isinstance(inner, dict) and inner.keys() <= properties.keys() else arguments


def _is_whole(value: str, is_string: bool, schema: Any) -> bool:
    """Whether a value without an end tag can have no more text. The digits of a number can always go on."""
    types = declared_types(schema)
    if is_string and (not types or "string" in types):
        return True
    try:
        parsed = load_json(value)
    except ValueError:
        return False
    return isinstance(parsed, bool) or not isinstance(parsed, int | float) or value.endswith("\n")


def _coerce(value: str, types: Sequence[str]) -> Any:
    try:
        load_json(value)
    except TooDeepError:
        return value  # vLLM's conversion would fail on it
    except ValueError:
        pass  # a string, or a number or boolean in another spelling
    return coerce_to_schema_type(value, types)


def _load(text: str) -> Any:
    """The value of a JSON text, or the text."""
    try:
        return load_json(text, parse_constant=str, parse_float=_finite)
    except ValueError:
        return text


def _finite(number: str) -> float | str:
    """The number, or its text if it is infinite, which JSON cannot represent."""
    return float(number) if math.isfinite(float(number)) else number


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _escape(text: str) -> str:
    return _dump(text)[1:-1]
