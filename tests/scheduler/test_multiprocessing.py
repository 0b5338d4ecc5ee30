"""With the engine core in its own process, as in `vllm serve`, the answers are those of a single process."""

from __future__ import annotations

from pathlib import Path

from testing.engine import running
from testing.scheduler.engines import Engines, References
from testing.scheduler.prompts import TEXTS
from testing.scheduler.runner import Request, difference, generate

PROMPTS = (TEXTS[0], TEXTS[2], TEXTS[4][:130])
NEW_TOKENS = 20


def test_engine_core_in_its_own_process(checkpoint: Path, engines: Engines, references: References) -> None:
    wanted = [references.get(prompt, NEW_TOKENS) for prompt in PROMPTS]
    engines.close()
    options = {"max_num_batched_tokens": 129, "enable_prefix_caching": True}
    with running(checkpoint, multiprocessing=True, **options) as llm:
        assert not hasattr(llm.llm_engine.engine_core, "engine_core"), "the engine core runs in this process"
        cold = generate(llm, [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in PROMPTS])
        cached = generate(llm, [Request(prompt, NEW_TOKENS) for prompt in PROMPTS])
    assert [result.cached for result in cold] == [0, 0, 0]
    assert [result.cached for result in cached] == [512, 512, 0]
    for result, reference in zip(cold + cached, wanted + wanted, strict=True):
        difference(result, reference)
