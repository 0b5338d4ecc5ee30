"""vLLM's reasoning and tool parsers for V4, fixed where they lose what the model wrote (listed in docs/serving.md).

They take vLLM's own name `deepseek_v4`, so the usual flags select them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from .compat import (
    DeepSeekV4Parser,
    ParserEngineReasoningAdapter,
    ParserEngineToolAdapter,
    ParserState,
    coerce_to_schema_type,
    deepseek_v4_config,
    extract_types_from_schema,
    find_tool_properties,
)
from .encoding import DSML
from .modes import select_mode

_PARAMETER = re.compile(rf'<{DSML}parameter\s+name="([^"]+)"(?:\s+string="([^"]*)")?\s*>')
_WRAPPERS = {"arguments", "input"}
_END = f"</{DSML}parameter>"


@functools.cache
def parser_config(thinking: bool) -> Any:
    """vLLM's state machine, in which thinking is only the block that opens the reply, returned as it was written.

    A later `<think>` or `</think>` is text of the answer or of a tool's parameter. Reasoning keeps its trailing line
    breaks, because a tool loop sends it back in a prompt that must match the cached prefix.
    """
    stock = deepseek_v4_config(thinking)
    transitions = {
        (state, terminal): transition
        for (state, terminal), transition in stock.transitions.items()
        if state is not ParserState.CONTENT or terminal not in ("THINK_START", "THINK_END")
    }
    return dataclasses.replace(stock, transitions=transitions, strip_trailing_reasoning_whitespace=False)


def read_parameters(text: str, partial: bool) -> list[tuple[str, bool, str]]:
    """`(name, is a string, value)` of each parameter inside an invoke, each name once.

    A parameter whose end tag is missing extends to the next one, or to the end of the invoke. Of several with one name
    the first counts, because it has been streamed by the time another arrives.

    Args:
        partial: more text follows, so the last parameter may be incomplete; it is returned if it is a string.
    """
    found: dict[str, tuple[bool, str]] = {}
    heads = list(_PARAMETER.finditer(text))
    for number, head in enumerate(heads):
        name, is_string = head.group(1), head.group(2) == "true"
        stop = heads[number + 1].start() if head is not heads[-1] else len(text)
        value, end, _ = text[head.end() : stop].partition(_END)
        if not end:
            if partial and not is_string and head is heads[-1]:
                break
            # The line break before the next tag belongs to the format.
            value = value.removesuffix("\n")
        found.setdefault(name, (is_string, value))
    return [(name, is_string, value) for name, (is_string, value) in found.items()]


def convert_value(value: str, is_string: bool, schema: Any) -> Any:
    """A parameter's value in the type that the model declared, unless the tool's schema does not allow that type."""
    types = extract_types_from_schema(schema) if isinstance(schema, dict) and _declares_type(schema) else ()
    if is_string:
        return value if not types or "string" in types else coerce_to_schema_type(value, types)
    try:
        parsed = json.loads(value, parse_constant=str, parse_float=_finite)
    except ValueError:
        return value if not types else coerce_to_schema_type(value, types)
    if list(types) == ["string"] and not isinstance(parsed, str):
        return value
    return parsed


def _finite(number: str) -> float | str:
    """The number, or its text if it is infinite, which JSON cannot represent."""
    return float(number) if math.isfinite(float(number)) else number


def _declares_type(schema: dict[str, Any]) -> bool:
    """Whether a schema declares a type; vLLM treats one that does not, such as a `$ref`, as a string's."""
    return any(key in schema for key in ("type", "enum", "anyOf", "oneOf", "allOf"))


def unwrap(arguments: dict[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments inside a single parameter `arguments` or `input`, where the model sometimes writes them."""
    inner = next(iter(arguments.values()), None) if len(arguments) == 1 else None
    if isinstance(inner, str):
        with contextlib.suppress(ValueError):
            inner = json.loads(inner)
    return inner if isinstance(inner, dict) and inner.keys() <= properties.keys() else arguments


class V4Parser(DeepSeekV4Parser):
    """vLLM's parser with `parser_config`, `read_parameters` and `convert_value`.

    With one of this package's tokenizers it starts in the thinking state if the request's mode thinks, and never for a
    continued answer. vLLM's own rule contradicts an encoding in which "do not think" wins: it takes the whole answer
    for thinking if a request sets `thinking: false` and an effort, or continues an answer.
    """

    parser_config = staticmethod(parser_config)

    def __init__(self, tokenizer: Any, tools: Any = None, **kwargs: Any) -> None:
        generation = getattr(tokenizer, "chat_generation", None)
        if generation is not None:
            request = kwargs.get("chat_template_kwargs") or {}
            mode = select_mode(
                generation,
                thinking=request.get("thinking"),
                enable_thinking=request.get("enable_thinking"),
                reasoning_effort=request.get("reasoning_effort"),
            )
            # The encoding closes the reasoning of a continued message: it cannot tell whether it was cut off.
            continued = bool(request.get("continue_final_message"))
            kwargs["chat_template_kwargs"] = {"thinking": mode.thinking and not continued}
        super().__init__(tokenizer, tools, **kwargs)

    def _convert_args(self, raw_args: str, partial: bool) -> str:
        name = next((slot.name for slot in self._tool_slots if slot.args == raw_args), None)
        properties = (find_tool_properties(self._tools, name) if self._tools and name else None) or {}
        arguments = {
            parameter: convert_value(value, is_string, properties.get(parameter))
            for parameter, is_string, value in read_parameters(raw_args, partial)
        }
        if properties and arguments.keys() <= _WRAPPERS - properties.keys():
            if partial:
                return ""  # nothing can be sent until the wrapper's content is complete
            arguments = unwrap(arguments, properties)
        return json.dumps(arguments, ensure_ascii=False)

    def _fix_arg_types(self, args_json: str, func_name: str) -> str:
        """`convert_value` has converted the types; vLLM's second pass sees only the JSON."""
        return args_json


class V4ReasoningParser(ParserEngineReasoningAdapter):
    """The parser of `--reasoning-parser deepseek_v4`."""

    _parser_engine_cls = V4Parser


class V4ToolParser(ParserEngineToolAdapter):
    """The parser of `--tool-call-parser deepseek_v4`; the structural tag guides `tool_choice` and strict tools."""

    _parser_engine_cls = V4Parser
    structural_tag_model = "deepseek_v4"
