"""The module from which vLLM loads the reasoning parser, and stop strings that leave the thinking alone.

vLLM 0.32 and 0.33 look for stop strings in all of the text, so "Question:" in the thinking ends a reply that has no
answer yet. DeepSeek's API looks for them in the answer. A plugin cannot choose the detokenizer, which finds them, so
this wraps the method that makes one. Can go once `test_stock_stops_in_the_thinking` fails.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from ..serving.parsers import V4ReasoningParser
from ..serving.stops import AnswerDetokenizer, thinks_first

__all__ = ["V4ReasoningParser", "stop_in_answers_only"]

_MARK = "vllm_deepseek_v4flash_stops_in_answers"


def stop_in_answers_only(detokenizer: Any = IncrementalDetokenizer) -> None:
    """Let the stop strings of requests with a reasoning parser match the answer only. Idempotent."""
    if _MARK in vars(detokenizer):
        return
    original = detokenizer.from_new_request

    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        if thinks_first(tokenizer, request):
            return AnswerDetokenizer(tokenizer, request)
        return original(tokenizer, request)

    detokenizer.from_new_request = classmethod(from_new_request)
    setattr(detokenizer, _MARK, True)


stop_in_answers_only()
