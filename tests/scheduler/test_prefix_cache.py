"""What vLLM reads from its prefix cache is what it would compute again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from testing.mutate import mutated
from testing.scheduler.engines import Engines, References
from testing.scheduler.mistakes import FORGET_STATES
from testing.scheduler.prompts import TEXTS, random_ids
from testing.scheduler.runner import Request, Result, Run, difference
from vllm_deepseek_v4flash.ops import dispatch

NEW_TOKENS = 20
# The length of a hit is a multiple of the largest page. By default vLLM keeps windows and states only at the last
# multiple in a prompt and where prompts diverge; here it keeps them at all multiples, so that every one is tested.
PAGE = 256
DEFAULT = {"enable_prefix_caching": True}
CACHING = {**DEFAULT, "prefix_cache_retention_interval": PAGE}


def check(run: Run, requests: Sequence[Request], wanted: Sequence[Result], cached: Sequence[int]) -> None:
    assert [run.result(number).cached for number in range(len(requests))] == list(cached)
    for number, reference in enumerate(wanted):
        difference(run.result(number), reference)


@dataclass(frozen=True)
class Turn:
    request: Request
    reference: Result
    cached: int
    """Prompt tokens that are in the cache after the earlier turns."""


@pytest.fixture(scope="module")
def conversation(engines: Engines) -> list[Turn]:
    """Each turn repeats the earlier ones, with the model's own answers."""
    runner = engines.get(**CACHING)
    turns, prompt, seen = [], TEXTS[2][:200], 0
    for number in range(4):
        reference = runner.alone(prompt, 70)
        turns.append(Turn(Request(prompt, 70), reference, min(seen, len(prompt) - 1) // PAGE * PAGE))
        # The last new token is not an input of the model.
        seen = len(prompt) + 70 - 1
        prompt = (*prompt, *reference.tokens, *random_ids(90, seed=number))
    return turns


@pytest.mark.parametrize("budget", [1024, 129, 5])
def test_turns_of_a_conversation(budget: int, conversation: list[Turn], engines: Engines) -> None:
    runner = engines.get(**CACHING)
    assert [turn.cached for turn in conversation] == [0, 256, 256, 512]
    for turn in conversation:
        run = runner.run([turn.request], budgets=(budget,))
        check(run, [turn.request], [turn.reference], [turn.cached])


@pytest.mark.parametrize("budget", [1024, 100, 7])
def test_texts_that_diverge_after_a_shared_beginning(budget: int, engines: Engines, references: References) -> None:
    runner = engines.get(**CACHING)
    wanted = [references.get(text, NEW_TOKENS, runner) for text in TEXTS]
    for (number, text), cached in zip(enumerate(TEXTS), (0, 256, 0, 512, 0), strict=True):
        request = Request(text, NEW_TOKENS)
        check(runner.run([request], budgets=(budget,)), [request], [wanted[number]], [cached])


def test_several_requests_hit_at_once(engines: Engines, references: References) -> None:
    runner = engines.get(**CACHING)
    # A hit is never the whole prompt: its last token must be computed.
    prompts = [TEXTS[2], TEXTS[3], TEXTS[2][:513], TEXTS[2][:512], TEXTS[1], TEXTS[2][:256], TEXTS[2][:257]]
    wanted = [references.get(prompt, NEW_TOKENS, runner) for prompt in prompts]
    runner.run([Request(TEXTS[2], 1)])
    requests = [Request(prompt, NEW_TOKENS) for prompt in prompts]
    run = runner.run(requests, budgets=(300,))
    check(run, requests, wanted, [512, 512, 512, 256, 0, 0, 256])


def test_what_is_kept_by_default(engines: Engines, references: References) -> None:
    """The end of a prompt and, for the second and later texts, the place where they diverge."""
    runner = engines.get(**DEFAULT)
    third = (*TEXTS[0][:300], *random_ids(300, seed=9))
    prompts = [TEXTS[0], TEXTS[1], third, TEXTS[0], TEXTS[0][:513]]
    wanted = [references.get(prompt, NEW_TOKENS, runner) for prompt in prompts]
    for prompt, reference, cached in zip(prompts, wanted, (0, 0, 256, 512, 512), strict=True):
        request = Request(prompt, NEW_TOKENS)
        check(runner.run([request], budgets=(200,)), [request], [reference], [cached])


@pytest.mark.both_runners
def test_a_hit_on_blocks_of_a_request_that_still_runs(engines: Engines, references: References) -> None:
    runner = engines.get(**CACHING)
    requests = [Request(TEXTS[2], 40), Request(TEXTS[3], NEW_TOKENS, arrival=20), Request(TEXTS[2], 5, arrival=20)]
    wanted = [references.get(request.prompt, request.max_tokens, runner) for request in requests]
    run = runner.run(requests, budgets=(64,))
    assert any({0, 1} <= step.keys() for step in run.steps)
    check(run, requests, wanted, [0, 512, 512])


def test_prompt_logprobs_of_a_cached_prompt(engines: Engines, references: References) -> None:
    """vLLM recomputes such a prompt and writes its blocks again."""
    runner = engines.get(**CACHING)
    request = Request(TEXTS[2], NEW_TOKENS, prompt_logprobs=True)
    wanted = references.get(TEXTS[2], NEW_TOKENS, runner)
    runner.run([Request(TEXTS[2], 1)])
    check(runner.run([request], budgets=(129,)), [request], [wanted], [0])


def test_a_cache_too_small_for_all_texts(engines: Engines, references: References) -> None:
    """Blocks of some caches of a text are evicted while others remain: a hit needs all of them."""
    wanted = [references.get(text, NEW_TOKENS) for text in TEXTS]
    runner = engines.get(**CACHING, num_gpu_blocks_override=130, max_num_batched_tokens=64)
    hits = 0
    for number in (0, 1, 2, 3, 0, 2, 4, 3, 1, 0):
        result = runner.run([Request(TEXTS[number], NEW_TOKENS)]).result(0)
        difference(result, wanted[number])
        hits += result.cached > 0
    assert 0 < hits < 7, "all hits or none: the cache is not under pressure"


def test_states_that_do_not_come_with_a_hit_are_caught(engines: Engines, references: References) -> None:
    """The first entry after a hit pools states of the CSA window before it."""
    runner = engines.get(**CACHING)
    reference = references.get(TEXTS[2], 1, runner)
    request = Request(TEXTS[2], 1)
    with dispatch.use("reference"), mutated(*FORGET_STATES):
        check(runner.run([request]), [request], [reference], [0])
        run = runner.run([request])
    assert run.result(0).cached == 2 * PAGE
    with pytest.raises(AssertionError, match="logprobs differ"):
        difference(run.result(0), reference)
