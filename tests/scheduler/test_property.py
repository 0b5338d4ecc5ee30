"""Under any schedule every request that finishes has the distributions that it has alone, and with a seed the tokens.

A schedule is drawn at random: prompts with shared beginnings, arrivals, new tokens, aborts, seeds, several sequences of
a request, priorities, the number of tokens of each step, and steps without free blocks. Its seed reproduces it;
`SCHEDULE_SEED=7 pytest …` draws others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from testing.scheduler.engines import Engines, References
from testing.scheduler.prompts import TEXT_LENGTH, TEXTS
from testing.scheduler.runner import Request, Result, Run, Runner, Squeeze, difference

# A request may start before there is room for its whole prompt, and is preempted if no block becomes free.
OPTIONS = {
    "enable_prefix_caching": True,
    "prefix_cache_retention_interval": 256,
    "scheduler_reserve_full_isl": False,
    "scheduling_policy": "priority",
}
SEED = int(os.environ.get("SCHEDULE_SEED", "2"))
MAX_NEW_TOKENS = 12
SAMPLING_SEED = 7
# Around the ends of entries, windows and pages.
LENGTHS = (1, 4, 5, 33, 127, 128, 129, 256, 257, 300, 511, 512, 513, 530, 641, 700, TEXT_LENGTH)
CHUNKS = (1, 3, 5, 127, 128, 129, 200)
# A schedule of fewer tokens a step than this on average takes a minute.
MIN_MEAN_BUDGET = 24


@dataclass(frozen=True)
class Schedule:
    requests: tuple[Request, ...]
    budgets: tuple[int, ...]
    squeezes: tuple[Squeeze, ...]
    threshold: int
    """vLLM's long_prefill_token_threshold, 0 for none."""


@st.composite
def requests(draw: Any, texts: Sequence[tuple[int, ...]]) -> Request:
    prompt = draw(st.sampled_from(texts))[: draw(st.sampled_from(LENGTHS))]
    seed = draw(st.sampled_from((None, None, None, SAMPLING_SEED)))
    return Request(
        prompt,
        max_tokens=draw(st.integers(1, MAX_NEW_TOKENS)),
        arrival=draw(st.integers(0, 30)),
        abort_after=draw(st.none() | st.none() | st.integers(1, 20)),
        # rarely: such a request does not read the prefix cache
        prompt_logprobs=draw(st.sampled_from((False, False, False, True))),
        seed=seed,
        n=1 if seed is None else draw(st.integers(1, 2)),
        priority=draw(st.integers(0, 2)),
    )


@st.composite
def schedules(draw: Any) -> Schedule:
    chunks = st.sampled_from(CHUNKS) | st.integers(1, 300)
    budgets = draw(st.lists(chunks, min_size=1, max_size=6))
    while sum(budgets) < MIN_MEAN_BUDGET * len(budgets):
        budgets.append(200)
    starts = draw(st.lists(st.integers(1, 15), max_size=2, unique=True))
    # Fewer blocks than a step may need: a request that gets none waits until the squeeze ends.
    blocks = st.sampled_from((0, 20, 40, 80, 120))
    squeezes = tuple(Squeeze(start, draw(st.integers(5, 40)), draw(blocks)) for start in starts)
    texts = draw(st.sampled_from((TEXTS[:2], TEXTS[2:4], TEXTS)))
    return Schedule(
        requests=tuple(draw(st.lists(requests(texts), min_size=2, max_size=6))),
        budgets=tuple(budgets),
        squeezes=squeezes,
        threshold=draw(st.just(0) | chunks),
    )


def references_of(request: Request, references: References, runner: Runner) -> list[Result]:
    """What each sequence of a request is when it runs alone."""
    seeds = [None] if request.seed is None else [request.seed + index for index in range(request.n)]
    return [references.get(request.prompt, MAX_NEW_TOKENS, runner, seed) for seed in seeds]


def overtaken(requests: Sequence[Request], run: Run) -> int:
    """How many requests began after another that arrived later and is more urgent."""
    begin = [next((step for step, tokens in enumerate(run.steps) if n in tokens), None) for n in range(len(requests))]
    return sum(
        first.arrival < second.arrival and second.priority < first.priority and (a is None or a > b)
        for first, a in zip(requests, begin, strict=True)
        for second, b in zip(requests, begin, strict=True)
        if b is not None
    )


def check_schedules(count: int, first_seed: int, engines: Engines, references: References) -> Counter[str]:
    """Run `count` schedules on one engine; returns how often each event that a schedule may contain happened."""
    seen: Counter[str] = Counter()
    worst = 0.0

    @seed(first_seed)
    @settings(
        max_examples=count, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    @given(schedules())
    def check(schedule: Schedule) -> None:
        nonlocal worst
        runner = engines.get(**OPTIONS)
        wanted = [references_of(request, references, runner) for request in schedule.requests]
        free = runner.pool.get_num_free_blocks()
        runner.scheduler.scheduler_config.long_prefill_token_threshold = schedule.threshold
        try:
            run = runner.run(schedule.requests, schedule.budgets, schedule.squeezes)
        finally:
            runner.scheduler.scheduler_config.long_prefill_token_threshold = 0
        for number, request in enumerate(schedule.requests):
            seen["aborted" if run.results[number] is None else "finished"] += 1
            seen["chunked"] += sum(run.chunks(number)) > max(run.chunks(number), default=0) > 1
            for result, reference in zip(run.sequences[number], wanted[number], strict=False):
                assert len(result.tokens) == request.max_tokens
                if request.seed is not None:
                    # Exactly: rounding, by up to 1e-5, decides between two tokens once in some 1e4.
                    assert result.tokens == reference.tokens[: request.max_tokens]
                worst = max(worst, difference(result, reference))
                seen["cached"] += result.cached > 0
                seen["sampled"] += result.tokens != result.logprobs.argmax(-1).tolist()
            seen["of two sequences"] += len(run.sequences[number]) == 2
        assert runner.pool.get_num_free_blocks() == free
        seen["overtaken"] += overtaken(schedule.requests, run)
        seen["together"] += any(len(step) > 1 for step in run.steps)
        seen["preempted"] += run.preemptions
        seen["schedules"] += 1

    check()
    print(f"seed {first_seed}: {dict(seen)}, largest difference {worst:.1e}")
    return seen


def assert_all_happened(seen: Counter[str], schedules: int) -> None:
    assert seen["schedules"] >= schedules
    for what in (
        "finished",
        "aborted",
        "chunked",
        "cached",
        "together",
        "preempted",
        "sampled",
        "of two sequences",
        "overtaken",
    ):
        assert seen[what] > 0, f"no schedule had a request {what}: {dict(seen)}"


def test_schedules(engines: Engines, references: References) -> None:
    assert_all_happened(check_schedules(20, SEED, engines, references), 20)


@pytest.mark.slow
def test_many_schedules(engines: Engines, references: References) -> None:
    assert_all_happened(check_schedules(200, SEED + 1, engines, references), 200)


@pytest.mark.slow
@pytest.mark.both_runners
def test_other_schedules(engines: Engines, references: References) -> None:
    assert_all_happened(check_schedules(30, SEED + 2, engines, references), 30)
