"""A request gives the same distributions whatever runs with it: short, long, prefilling, decoding, aborted requests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from testing.mutate import mutated
from testing.scheduler.engines import Engines, References
from testing.scheduler.mistakes import SHARE_PAGES
from testing.scheduler.prompts import TEXTS
from testing.scheduler.runner import Request, Run, difference

NEW_TOKENS = 20
# Next to the ends of entries and pages.
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 255)


def check(run: Run, requests: Sequence[Request], references: References) -> None:
    """Every request that came to its end is as if it had been alone."""
    for number, request in enumerate(requests):
        if run.results[number] is not None:
            difference(run.result(number), references.get(request.prompt, NEW_TOKENS))


def test_prompts_of_many_lengths_in_one_step(engines: Engines, references: References) -> None:
    requests = [Request(TEXTS[4][:length], NEW_TOKENS, prompt_logprobs=True) for length in LENGTHS]
    run = engines.get().run(requests)
    assert run.steps[0] == dict(enumerate(LENGTHS))
    check(run, requests, references)


def test_requests_that_arrive_while_others_decode(engines: Engines, references: References) -> None:
    requests = [Request(text, NEW_TOKENS, arrival=5 * number) for number, text in enumerate(TEXTS)]
    run = engines.get().run(requests, budgets=(130,))
    kinds = [{count == 1 for count in step.values()} for step in run.steps]
    assert {True, False} in kinds, "no step held both a decoding and a prefilling request"
    check(run, requests, references)


def test_the_same_prompt_many_times_at_once(engines: Engines, references: References) -> None:
    requests = [Request(TEXTS[0][:300], NEW_TOKENS)] * 6
    run = engines.get().run(requests, budgets=(128,))
    check(run, requests, references)


@pytest.mark.parametrize("caching", [False, True])
def test_aborted_requests_leave_nothing_behind(caching: bool, engines: Engines, references: References) -> None:
    runner = engines.get(enable_prefix_caching=caching)
    free = runner.pool.get_num_free_blocks()
    requests = [
        Request(TEXTS[0], NEW_TOKENS),
        Request(TEXTS[1], NEW_TOKENS, abort_after=3),  # waiting or prefilling
        Request(TEXTS[2], NEW_TOKENS, arrival=2, abort_after=9),  # prefilling
        Request(TEXTS[4][:5], 500, arrival=1, abort_after=40),  # decoding
        Request(TEXTS[3], NEW_TOKENS, arrival=12),  # in the blocks of the ones before
        Request(TEXTS[2], NEW_TOKENS, arrival=20),
        Request(TEXTS[1], NEW_TOKENS, arrival=20),
    ]
    run = runner.run(requests, budgets=(100,))
    assert [result is None for result in run.results] == [False, True, True, True, False, False, False]
    assert len(run.chunks(3)) > 20
    assert 0 < sum(run.chunks(2)) < len(TEXTS[2])
    assert runner.pool.get_num_free_blocks() == free
    check(run, requests, references)


def test_rows_of_another_request_are_caught(engines: Engines, references: References) -> None:
    requests = [Request(TEXTS[4], NEW_TOKENS), Request(TEXTS[0][:200], NEW_TOKENS)]
    with mutated(*SHARE_PAGES):
        run = engines.get().run(requests)
    with pytest.raises(AssertionError, match="logprobs differ"):
        check(run, requests, references)
