"""vLLM's reasoning and tool parsers for V4, fixed where they lose what the model wrote (listed in docs/serving.md).

They take vLLM's own name `deepseek_v4`, so the usual flags select them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from .arguments import ArgumentReader
from .compat import (
    DeepSeekV4Parser,
    DeltaFunctionCall,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    IncrementalLexer,
    ParserEngineReasoningAdapter,
    ParserEngineToolAdapter,
    ParserState,
    ToolCall,
    deepseek_v4_config,
    find_tool_properties,
)
from .encoding import DSML
from .messages import is_continued
from .modes import select_mode

_INVOKE = f"<{DSML}invoke"
_ENDS_OF_CALL = (f"</{DSML}invoke>", f"</{DSML}tool_calls>")


def ends_in_call(text: str) -> bool:
    """Whether a reply ends inside an invoke."""
    return text.rfind(_INVOKE) > max(map(text.rfind, _ENDS_OF_CALL))


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


class V4Parser(DeepSeekV4Parser):
    """vLLM's parser with `parser_config`, and `ArgumentReader` for the arguments of calls.

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
        self._whole = False
        self._readers: dict[int, ArgumentReader] = {}
        super().__init__(tokenizer, tools, **kwargs)
        self._engine._lexer = PiecewiseLexer(self._engine._lexer._shape)

    def _reset(self, initial_state: Any = None) -> None:
        super()._reset(initial_state)
        self._readers = {}

    def _reader(self, index: int) -> ArgumentReader:
        if index not in self._readers:
            name = self._tool_slots[index].name
            self._readers[index] = ArgumentReader(
                (find_tool_properties(self._tools, name) if self._tools else None) or {}
            )
        return self._readers[index]

    def _handle_arg_chunk(self, event: Any, deltas: list[Any]) -> None:
        """Read a piece of a call's text; vLLM's version converts all of the call's text with every piece."""
        self._send(event.tool_index, self._reader(event.tool_index).read(event.value), deltas)

    def _handle_tool_end(self, event: Any, deltas: list[Any]) -> None:
        """End a call, by its tag, or by the end of the reply, whose event has no text.

        A call that is cut off before its arguments is left out: its name may be incomplete.
        """
        if event.value or event.tool_index in self._readers:
            self._send(event.tool_index, self._reader(event.tool_index).finish(closed=bool(event.value)), deltas)

    def _send(self, index: int, arguments: str, deltas: list[Any]) -> None:
        slot = self._tool_slots[index]
        if not slot.name_sent:
            self._emit_name_delta(index, deltas, slot.name or None)
        if arguments and slot.name_sent and not self._whole:
            deltas.append(DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=arguments)))

    def _single_pass_parse(self, text: str, token_ids: Any, initial_state: Any = None) -> Any:
        self._whole = True
        try:
            return super()._single_pass_parse(text, token_ids, initial_state)
        finally:
            self._whole = False

    def _build_extracted_result(self, *deltas: Any) -> ExtractedToolCallInformation:
        calls = []
        for index, slot in enumerate(self._tool_slots):
            name = slot.name.strip()
            if index in self._readers and self._accept_tool_name(name):
                self._ensure_tool_id(slot, name)
                calls.append(ToolCall(id=slot.id, function=FunctionCall(name=name, arguments=self._reader(index).json)))
        content = "".join(delta.content for delta in deltas if delta is not None and delta.content)
        return ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=calls,
            content=self._strip_content_whitespace(content, bool(calls)),
        )


class PiecewiseLexer(IncrementalLexer):
    """vLLM's lexer, fed a bounded piece at a time: it copies all that it has been fed whenever it finds a tag in it."""

    PIECE = 512

    def feed(self, text: str, token_texts: tuple[str, ...] = (), token_count: int = 0) -> list[Any]:
        if len(text) <= self.PIECE:
            return super().feed(text, token_texts, token_count)
        counts = self._char_token_counts(text, token_texts, token_count)
        tokens: list[Any] = []
        for start in range(0, len(text), self.PIECE):
            self.buffer += text[start : start + self.PIECE]
            self._token_counts.extend(counts[start : start + self.PIECE])
            tokens += self._drain()
        return tokens


class V4ReasoningParser(ParserEngineReasoningAdapter):
    """The parser of `--reasoning-parser deepseek_v4`."""

    _parser_engine_cls = V4Parser
    _answers_at_once = False

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether a prompt, or what has been generated, ends outside the thinking."""
        self._answers_at_once = super().is_reasoning_end(input_ids)
        return self._answers_at_once

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """`(reasoning, content)` of a whole reply. The rest of a continued answer is content."""
        if is_continued(getattr(request, "messages", None) or ()):
            return None, model_output or None
        return super().extract_reasoning(model_output, request)

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return 0 if self._answers_at_once else super().count_reasoning_tokens(token_ids)


class V4ToolParser(ParserEngineToolAdapter):
    """The parser of `--tool-call-parser deepseek_v4`; the structural tag guides `tool_choice` and strict tools."""

    _parser_engine_cls = V4Parser
    structural_tag_model = "deepseek_v4"
