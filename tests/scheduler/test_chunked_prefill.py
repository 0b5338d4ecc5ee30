"""A prompt gives the same distributions in chunks of any size, at every position of the prompt and after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testing.mutate import mutated
from testing.scheduler.engines import Engines, References
from testing.scheduler.exact import rounding_once
from testing.scheduler.mistakes import FORGET_STATES
from testing.scheduler.prompts import TEXTS
from testing.scheduler.runner import Request, difference
from vllm_deepseek_v4flash.ops import dispatch

PROMPT, NEW_TOKENS = TEXTS[0], 20

# Around the units of the caches: entries of 4 and 128 tokens, pages of 4, 8, 64 and 256.
CHUNKS = (1, 3, 5, 127, 128, 129, 200)


def expected_chunks(prompt: int, chunk: int, new_tokens: int) -> list[int]:
    rest = [prompt % chunk] if prompt % chunk else []
    return [chunk] * (prompt // chunk) + rest + [1] * (new_tokens - 1)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_of(chunk: int, engines: Engines, references: References) -> None:
    prompt = PROMPT[: 600 if chunk > 1 else 300]
    reference = references.get(prompt, NEW_TOKENS)
    run = engines.get().run([Request(prompt, NEW_TOKENS, prompt_logprobs=True)], budgets=(chunk,))
    assert run.chunks(0) == expected_chunks(len(prompt), chunk, NEW_TOKENS)
    difference(run.result(0), reference)


@pytest.mark.parametrize("chunk", [5, 129])
def test_max_num_batched_tokens(chunk: int, engines: Engines, references: References) -> None:
    """The same by vLLM's own option, which also sizes the buffers of a step."""
    reference = references.get(PROMPT[:600], NEW_TOKENS)
    # vLLM requires max_num_batched_tokens >= max_num_seqs.
    runner = engines.get(max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 8))
    run = runner.run([Request(PROMPT[:600], NEW_TOKENS, prompt_logprobs=True)])
    assert run.chunks(0) == expected_chunks(600, chunk, NEW_TOKENS)
    difference(run.result(0), reference)


@pytest.mark.both_runners
def test_chunks_of_changing_size(engines: Engines, references: References) -> None:
    reference = references.get(PROMPT, NEW_TOKENS)
    run = engines.get().run([Request(PROMPT, NEW_TOKENS, prompt_logprobs=True)], budgets=(1, 7, 128, 3, 250, 4))
    assert run.chunks(0)[:7] == [1, 7, 128, 3, 250, 4, 1]
    difference(run.result(0), reference)


def test_long_prompts_are_held_back_for_others(engines: Engines, references: References) -> None:
    prompts = [TEXTS[0], TEXTS[2], TEXTS[4][:5]]
    wanted = [references.get(prompt, NEW_TOKENS) for prompt in prompts]
    run = engines.get(long_prefill_token_threshold=29).run([Request(prompt, NEW_TOKENS) for prompt in prompts])
    # At the end the last long prompt runs alone and may take a whole step.
    assert run.chunks(0)[:20] == run.chunks(1)[:20] == [29] * 20
    assert run.chunks(2) == [5] + [1] * (NEW_TOKENS - 1)
    for number, reference in enumerate(wanted):
        difference(run.result(number), reference)


def test_fp8_rows_are_not_fp32_rows(references: References) -> None:
    with pytest.raises(AssertionError, match="logprobs differ"):
        difference(references.get(PROMPT, NEW_TOKENS, kv_cache_dtype="fp8"), references.get(PROMPT, NEW_TOKENS))


@pytest.mark.parametrize("chunk", [5, 127, 200])
def test_a_compressor_without_memory_is_caught(chunk: int, engines: Engines, references: References) -> None:
    reference = references.get(PROMPT, NEW_TOKENS)
    request = Request(PROMPT, 1, prompt_logprobs=True)
    with dispatch.use("reference"), mutated(*FORGET_STATES):
        whole = engines.get().run([request])
        difference(whole.result(0), reference)
        chunked = engines.get().run([request], budgets=(chunk,))
    with pytest.raises(AssertionError, match="logprobs differ"):
        difference(chunked.result(0), reference)


@pytest.fixture(scope="module")
def exact_engines(engines: Engines) -> Iterator[Engines]:
    engines.close()
    with rounding_once():
        exact = Engines(engines.path)
        yield exact
        exact.close()


@pytest.mark.parametrize("chunk", [3, 127, 129, 200])
def test_fp8_rows_do_not_depend_on_chunks(chunk: int, exact_engines: Engines) -> None:
    """The rows are the same bytes if the numbers before their quantisation are.

    In fp32 they are not quite: a value on the border of two fp8 codes goes to either with the order of its sums, a step
    of 6 % in that value, and the indexer then keeps another entry. Here that moved logprobs by up to 0.2, at a few
    positions or, from an early one, at all, and changed no greedy token. Rounding that does not depend on the size of a
    step removes the effect and leaves what the chunks carry.
    """
    runner = exact_engines.get(kv_cache_dtype="fp8")
    reference = runner.alone(PROMPT, NEW_TOKENS)
    run = runner.run([Request(PROMPT, NEW_TOKENS, prompt_logprobs=True)], budgets=(chunk,))
    difference(run.result(0), reference)
