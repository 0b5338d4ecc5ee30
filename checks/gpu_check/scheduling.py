"""What vLLM's scheduler does to a request, on the engine of the scheduler's tests: no token may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from testing.scheduler.prompts import TEXTS
from testing.scheduler.runner import TOLERANCE, Request, Result, Runner, Squeeze, difference

from .expected import Reply
from .results import FailedError

# Steps run one by one here, so none may be scheduled ahead.
OPTIONS: dict[str, Any] = {
    "enable_prefix_caching": True, "prefix_cache_retention_interval": 256, "async_scheduling": False,
}  # fmt: skip
CHUNKS = (1, 7, 128, 3, 250, 4)
# While they decode they grow beyond the ends of pages of every cache.
GROWING = (TEXTS[0][:230], TEXTS[2][:20], TEXTS[2][:40], TEXTS[4][:60])


def cases(llm: Any, wanted: list[Reply], dry: bool) -> list[tuple[str, Callable[[], str]]]:
    """Name and function of each case. A function returns its result as text; FailedError or AssertionError if wrong."""
    tokens, texts = (3, TEXTS[:1]) if dry else (20, TEXTS)
    text = texts[0][:300] if dry else texts[0]
    runner = Runner(llm)
    references: dict[tuple[int, ...], Result] = {}

    def alone(prompt: tuple[int, ...], count: int) -> Result:
        if prompt not in references or len(references[prompt].tokens) < count:
            references[prompt] = runner.alone(prompt, count)
        return references[prompt]

    def against_the_cpu() -> str:
        for number, text in enumerate(texts):
            found, right = alone(text, tokens).tokens, wanted[number].tokens[:tokens]
            if found != right:
                raise FailedError(f"text {number}: {found}, on the CPU {right}")
        return f"{len(texts)} texts of {len(texts[0])} tokens: all {tokens} tokens of each are the CPU's"

    def chunked() -> str:
        runner.forget()
        run = runner.run([Request(text, tokens, prompt_logprobs=True)], budgets=CHUNKS)
        off = difference(run.result(0), alone(text, tokens))
        return f"in chunks of {run.chunks(0)[: len(CHUNKS)]} ..., log-probabilities within {off:.1e} of {TOLERANCE:g}"

    def cached() -> str:
        first, again = alone(text, tokens), Request(text, tokens)
        runner.forget()
        runner.run([again])
        result = runner.run([again]).result(0)
        off = difference(result, first)
        if not result.cached:
            raise FailedError("nothing came from the prefix cache")
        return f"{result.cached} of {len(text)} tokens from the cache, log-probabilities within {off:.1e}"

    def preempted() -> str:
        prompts, count = (GROWING[1:], 12) if dry else (GROWING, 100)
        references = [alone(prompt, count) for prompt in prompts]
        runner.forget()
        requests = [Request(prompt, count, arrival=2 * number) for number, prompt in enumerate(prompts)]
        run = runner.run(requests, budgets=(40,), squeezes=[Squeeze(2, 25), Squeeze(42, 3, free=2)])
        off = max(difference(run.result(number), reference) for number, reference in enumerate(references))
        if not run.preemptions:
            raise FailedError("no request was preempted")
        return f"{run.preemptions} preemptions of {len(prompts)} requests, log-probabilities within {off:.1e}"

    return [
        ("alone, against the CPU", against_the_cpu),
        ("chunked prefill", chunked),
        ("prefix cache", cached),
        ("preemption", preempted),
    ]
