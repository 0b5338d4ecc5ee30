"""Stop strings of a request that thinks first: they are looked for in its answer, as in DeepSeek's API."""

from __future__ import annotations

from typing import Any

from .compat import FastIncrementalDetokenizer, check_stop_strings, uses_fast_detokenizer
from .encoding import END_THINK, THINK
from .parsers import parser_config


def thinks_first(tokenizer: Any, request: Any) -> bool:
    """Whether a request has stop strings and a reasoning parser, and its prompt ends inside the thinking.

    Args:
        request: vLLM's EngineCoreRequest.
    """
    if not request.sampling_params.stop or request.reasoning_parser_kwargs is None or not request.prompt_token_ids:
        return False
    if tokenizer is None or not uses_fast_detokenizer(tokenizer):
        return False
    start, end = tokenizer.convert_tokens_to_ids([THINK, END_THINK])
    return next((token == start for token in reversed(request.prompt_token_ids) if token in (start, end)), False)


class AnswerDetokenizer(FastIncrementalDetokenizer):
    """vLLM's detokenizer, whose stop strings count from where the thinking ends: at `</think>` or at a tool call."""

    output_text: str
    stop: list[str]

    def __init__(self, tokenizer: Any, request: Any) -> None:
        super().__init__(tokenizer, request)
        # Without any, the base class does not look for them.
        self._stops = self.stop
        self.stop = []
        terminals = parser_config(True).terminals
        self._ends = (terminals["THINK_END"], *terminals["TOOL_START"])
        self._answer: int | None = None  # where the answer starts in the text

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """Detokenize new tokens up to the one that completes a stop string, and return that string."""
        for number, token in enumerate(new_token_ids):
            before = len(self.output_text)
            super().update([token], stop_terminated and number == len(new_token_ids) - 1)
            if self._answer is None:
                self._answer = self._end_of_thinking(before)
            stop = self._stop(before)
            if stop is not None:
                return stop
        return None

    def _end_of_thinking(self, before: int) -> int | None:
        """Where the first text ends that ends the thinking, if the text from `before` on completes one."""
        start = max(0, before - max(map(len, self._ends)) + 1)
        found = [(self.output_text.find(end, start), end) for end in self._ends]
        return min((place + len(end) for place, end in found if place >= 0), default=None)

    def _stop(self, before: int) -> str | None:
        """The stop string that the text from `before` on completes in the answer; the output then ends there."""
        if self._answer is None or self.num_output_tokens() <= self.min_tokens:
            return None
        start = max(self._answer, before - max(map(len, self._stops)) + 1)
        answer = self.output_text[start:]
        found = check_stop_strings(
            answer, min(len(answer), len(self.output_text) - before), self._stops, self.include_stop_str_in_output
        )
        if found is None:
            return None
        stop, end = found
        if end != -1:
            self.output_text = self.output_text[: start + end]
        return stop
