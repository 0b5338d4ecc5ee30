"""Parses a given reply with vLLM's output parsers, whole or streamed, as its server does, but without an engine."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from testing.serving.tokenizer import ids_of, reference, write_tokenizer

EOS_ID = 1
Parsers = tuple[Any, Any]
"""A reasoning and a tool parser's class."""


@dataclass
class Reply:
    """What a client has received in the end."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """(name, arguments as sent) of each call."""

    @property
    def arguments(self) -> list[Any]:
        return [json.loads(arguments) for _, arguments in self.calls]


@functools.cache
def tokenizer() -> Any:
    """Our tokenizer for April's weights, on DeepSeek's real file."""
    from vllm_deepseek_v4flash.serving.tokenizer import AprilTokenizer

    with tempfile.TemporaryDirectory() as directory:
        return AprilTokenizer.from_pretrained(str(write_tokenizer(Path(directory))))


def stock() -> Parsers:
    """vLLM's own reasoning and tool parser for V4."""
    from vllm.reasoning.deepseek_v4_engine_reasoning_parser import DeepSeekV4ParserReasoningAdapter
    from vllm.tool_parsers.deepseekv4_engine_tool_parser import DeepSeekV4EngineToolParser

    return DeepSeekV4ParserReasoningAdapter, DeepSeekV4EngineToolParser


def ours() -> Parsers:
    from vllm_deepseek_v4flash.serving.parsers import V4ReasoningParser, V4ToolParser

    return V4ReasoningParser, V4ToolParser


def make_request(tools: Sequence[Any], **fields: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    if tools:
        fields = {"tools": list(tools), "tool_choice": "auto"} | fields
    return ChatCompletionRequest(messages=[{"role": "user", "content": "U"}], model="m", **fields)


def make_parser(parsers: Parsers, request: Any, **chat_template_kwargs: Any) -> Any:
    """The parser that `--reasoning-parser deepseek_v4 --tool-call-parser deepseek_v4` composes of the two."""
    from vllm.parser.abstract_parser import DelegatingParser

    class Composed(DelegatingParser):
        reasoning_parser_cls, tool_parser_cls = parsers

    return Composed(tokenizer(), request.tools, chat_template_kwargs=chat_template_kwargs)


def whole(parsers: Parsers, text: str, tools: Sequence[Any] = (), **chat_template_kwargs: Any) -> Reply:
    """The reply `text` parsed when it is complete."""
    request = make_request(tools)
    parser = make_parser(parsers, request, **chat_template_kwargs)
    reasoning, content, calls = parser.parse(
        text, request, enable_auto_tools=True, model_output_token_ids=[*ids_of(text), EOS_ID]
    )
    return Reply(reasoning or "", content or "", [(call.name, call.arguments) for call in calls or []])


def streamed(
    parsers: Parsers, text: str, tools: Sequence[Any] = (), *, step: int = 1, **chat_template_kwargs: Any
) -> Reply:
    """The reply parsed while it arrives, `step` tokens at a time, and joined as a client joins it."""
    request = make_request(tools)
    parser = make_parser(parsers, request, **chat_template_kwargs)
    prompt = tokenizer().apply_chat_template([{"role": "user", "content": "U"}], **chat_template_kwargs)
    reply = Reply()
    arguments: list[Any] = []
    stream, ids = DecodeStream(skip_special_tokens=False), ids_of(text)
    for start in range(0, len(ids) + 1, step):
        chunk = ids[start : start + step]
        finished = start + step > len(ids)
        piece = "".join(stream.step(reference(), token) or "" for token in chunk)
        delta = parser.parse_delta(
            piece, [*chunk, EOS_ID] if finished else chunk, request, prompt_token_ids=prompt, finished=finished
        )
        if delta is None:
            continue
        reply.reasoning += delta.reasoning or ""
        reply.content += delta.content or ""
        for call in delta.tool_calls or []:
            while len(arguments) <= call.index:
                arguments.append(["", ""])
            arguments[call.index][0] += call.function.name or ""
            arguments[call.index][1] += call.function.arguments or ""
    reply.calls = [(name, text) for name, text in arguments]
    return reply
