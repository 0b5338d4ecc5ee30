"""Speculative decoding gives the distributions of decoding without it, wherever a draft is rejected.

The draft is one that knows the answer (`testing/scheduler/drafts.py`), so that rejections fall where the test wants
them: at every offset to window pages, to entries of 4 and of 128 tokens, and next to chunks of other requests' prompts.
Tokens alone would not show a stale entry, so whole distributions are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

from testing.mutate import mutated
from testing.scheduler import mistakes
from testing.scheduler.drafts import MODEL, PERIOD, Prophet
from testing.scheduler.engines import Engines, References
from testing.scheduler.prompts import TEXTS
from testing.scheduler.runner import Request, Run, Runner, difference
from vllm_deepseek_v4flash.ops import dispatch

# Of fp32 sums in another order; log-probabilities near -10 have an ulp of 1e-6. A stale row makes 1e-3 and more.
SAME = 1e-5
NEW_TOKENS = 90
# Together they decode over the ends of two HCA entries and of four window pages, from beginnings 1 token apart.
LENGTHS = (100, 101, 150, 231)
SPECULATING: dict[str, Any] = {
    "speculative_config": {"method": "custom_class", "model": MODEL, "num_speculative_tokens": 5}
}
PROMPTS = tuple(TEXTS[n][:length] for n, length in enumerate(LENGTHS))


@pytest.fixture(autouse=True)
def _told(references: References) -> Iterator[None]:
    Prophet.texts = [[*prompt, *references.get(prompt, NEW_TOKENS).tokens] for prompt in PROMPTS]
    Prophet.rejected.clear()
    yield
    Prophet.texts = []


def run(runner: Runner, budgets: tuple[int, ...] = (), tokens: int = NEW_TOKENS, count: int = len(PROMPTS)) -> Run:
    requests = [Request(prompt, tokens, arrival=2 * n) for n, prompt in enumerate(PROMPTS[:count])]
    return runner.run(requests, budgets)


def worst(found: Run, references: References) -> float:
    """The largest difference of any distribution; AssertionError if it is more than rounding."""
    count = range(len(found.results))
    return max(difference(found.result(n), references.get(PROMPTS[n], NEW_TOKENS), SAME) for n in count)


@pytest.mark.parametrize("budgets", [(), (64, 31)], ids=["whole", "chunked"])
def test_rejected_drafts_leave_nothing(budgets: tuple[int, ...], engines: Engines, references: References) -> None:
    found = run(engines.get(**SPECULATING), budgets)
    assert worst(found, references) <= SAME
    assert len(found.steps) < NEW_TOKENS, "no draft was accepted"
    assert sorted(set(range(PERIOD)) - Prophet.rejected) == []


@pytest.mark.both_runners
def test_ngrams_of_the_prompt(engines: Engines, references: References) -> None:
    """Most drafts are wrong, because the text is random: its tokens occur again, but not in the same order."""
    options = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    found = run(engines.get(speculative_config=options, disable_log_stats=False), (64, 31), tokens=20)
    assert worst(found, references) <= SAME
    assert sum(sum(step.values()) for step in found.steps) > sum(map(len, PROMPTS)) + 20 * len(PROMPTS), (
        "nothing was drafted"
    )
    counters = {metric.name: metric.value for metric in get_metrics_snapshot() if isinstance(metric, Counter)}
    drafted = counters["vllm:spec_decode_num_draft_tokens"]
    assert counters["vllm:spec_decode_num_drafts"] > 0
    assert 0 < counters["vllm:spec_decode_num_accepted_tokens"] < drafted


@pytest.fixture
def referenced(engines: Engines) -> Iterator[Runner]:
    """Whose ops are the references, which the mistakes change."""
    engines.close()
    with dispatch.use("reference"):
        yield engines.get(enforce_eager=True, **SPECULATING)
    engines.close()


def test_what_a_rejected_draft_leaves_would_be_seen(referenced: Runner, references: References) -> None:
    """All mistakes on one engine: a start takes longer than the test."""
    assert worst(run(referenced, tokens=30, count=2), references) <= SAME
    for mistake in ("FIRST_ENTRY_STAYS", "FIRST_STATE_STAYS", "FIRST_WINDOW_ROW_STAYS"):
        referenced.forget()
        referenced.engine.apply_model(lambda model: [cache.kv_cache.zero_() for cache in model.model.steps.caches])
        Prophet.rejected.clear()
        with mutated(*getattr(mistakes, mistake)):
            found = run(referenced, tokens=30, count=2)
        print(mistake)
        with pytest.raises(AssertionError, match="logprobs differ"):
            worst(found, references)
