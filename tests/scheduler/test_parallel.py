"""Tensor, expert and pipeline parallelism give transformers' distributions, with prompts in chunks of 129 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testing import oracle
from testing.engine import running
from testing.scheduler.prompts import MIN_MARGIN, TEXTS
from testing.scheduler.runner import Request, Result, difference, generate
from testing.tiny import TinySpec, write_checkpoint

# vLLM needs a layer of each kind in every stage. Layer 2, in the second stage, routes by token id.
SPEC = TinySpec(
    "both stages have a CSA and an HCA layer, and hash layers",
    {
        "num_hidden_layers": 5,
        "compress_ratios": [4, 128, 4, 128, 0, 0],
        "num_hash_layers": 3,
        "hc_mult": 3,
        "index_topk": 16,
        "index_n_heads": 32,
    },
    prompt_length=400,
)
PROMPTS = (TEXTS[0][:400], TEXTS[2][:200])
NEW_TOKENS = 12

TENSOR = {"tensor_parallel_size": 2}
PIPELINE = {"pipeline_parallel_size": 2}


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("parallel") / "model", SPEC)


@pytest.fixture(scope="module")
def wanted(staged: Path) -> list[Result]:
    model, results = oracle.load_oracle(staged), []
    for prompt in PROMPTS:
        tokens = oracle.greedy(model, prompt, NEW_TOKENS)
        assert min(oracle.selection_margins(model, [*prompt, *tokens]).values()) > MIN_MARGIN
        rows = oracle.logprobs(model, [*prompt, *tokens])[:-1]
        results.append(Result(tokens, rows[len(prompt) - 1 :], rows[: len(prompt) - 1], 0))
    return results


def check(path: Path, wanted: list[Result], **options: Any) -> None:
    requests = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in PROMPTS]
    with running(path, multiprocessing=True, max_num_batched_tokens=129, **options) as llm:
        results = generate(llm, requests)
    for result, reference in zip(results, wanted, strict=True):
        difference(result, reference)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(TENSOR, id="tensor"),
        pytest.param({**TENSOR, "enable_expert_parallel": True}, id="expert", marks=pytest.mark.slow),
        pytest.param(PIPELINE, id="pipeline"),
        pytest.param({**TENSOR, **PIPELINE}, id="tensor and pipeline", marks=pytest.mark.slow),
    ],
)
def test_two_ranks(
    options: dict[str, Any], staged: Path, wanted: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "pipeline_parallel_size" in options:
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,3")
    check(staged, wanted, **options)
