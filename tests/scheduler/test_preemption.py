"""A request that is preempted and starts again gives the same distributions."""

from __future__ import annotations

import pytest

from testing.scheduler.engines import Engines, References
from testing.scheduler.prompts import TEXTS
from testing.scheduler.runner import Request, Squeeze, difference

# While they decode they grow beyond the ends of pages of every cache.
PROMPTS = (TEXTS[0][:230], TEXTS[2][:20], TEXTS[2][:40], TEXTS[4][:60])
NEW_TOKENS = 100


@pytest.mark.parametrize("caching", [False, True])
def test_a_handful_of_blocks(caching: bool, engines: Engines, references: References) -> None:
    wanted = [references.get(prompt, NEW_TOKENS) for prompt in PROMPTS]
    runner = engines.get(
        num_gpu_blocks_override=64, max_num_batched_tokens=16, max_model_len=400, enable_prefix_caching=caching
    )
    requests = [Request(prompt, NEW_TOKENS) for prompt in PROMPTS]
    run = runner.run(requests)
    assert run.preemptions > 0
    for number, reference in enumerate(wanted):
        difference(run.result(number), reference)


@pytest.mark.parametrize(
    ("caching", "start"),
    [
        (False, 2),
        (False, 15),
        (False, 40),
        pytest.param(True, 2, marks=pytest.mark.both_runners),
        (True, 15),
        (True, 40),
    ],
)
def test_blocks_are_gone_for_a_while(caching: bool, start: int, engines: Engines, references: References) -> None:
    """The squeeze meets the prefill of the first request, that of the others, and decoding."""
    runner = engines.get(enable_prefix_caching=caching)
    wanted = [references.get(prompt, NEW_TOKENS, runner) for prompt in PROMPTS]
    requests = [Request(prompt, NEW_TOKENS, arrival=2 * number) for number, prompt in enumerate(PROMPTS)]
    run = runner.run(requests, budgets=(40,), squeezes=[Squeeze(start, 25), Squeeze(start + 40, 3, free=2)])
    assert run.preemptions > 0
    for number, reference in enumerate(wanted):
        difference(run.result(number), reference)
