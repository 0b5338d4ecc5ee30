"""With vLLM's graphs of whole decoding steps, and of the parts between attention of other steps, tokens are the same.

Collected only when `tests/test_v2_runner.py` has switched the V2 runner on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testing import engine, tiny
from testing.parity import TOLERANCE
from testing.v2_on_cpu.cuda_graphs import CpuGraph, capture
from vllm_deepseek_v4flash.ops import dispatch

PROMPTS = (slice(0, 150), slice(20, 43), slice(5, 6))
SHORT = (slice(0, 9), slice(9, 13), slice(5, 6))
"""Three, which leave a row of padding in a graph of four. The longest of PROMPTS has more entries than the indexer
chooses."""


@pytest.mark.parametrize(
    ("config", "ops", "sizes", "prompts", "options"),
    [
        pytest.param("topk", "auto", [1, 2, 4, 64], PROMPTS, {}, id="indexer"),
        pytest.param("mixed", "auto", [1, 2, 4, 64], PROMPTS, {}, id="flash-pattern"),
        pytest.param("mixed", "auto", [1, 2, 4, 64], PROMPTS, {"kv_cache_dtype": "fp8"}, id="fp8-rows"),
        # Interpreted kernels take seconds a step.
        pytest.param("topk", "triton", [4, 8], SHORT, {"max_num_seqs": 4}, id="triton"),
    ],
)
def test_tokens_with_graphs_are_those_without(
    tmp_path: Path,
    config: str,
    ops: str,
    sizes: list[int],
    prompts: tuple[slice, ...],
    options: dict[str, Any],
) -> None:
    spec, new_tokens = tiny.CONFIGS[config], 30 if ops == "auto" else 3
    path, tokens = tiny.write_checkpoint(tmp_path / "model", spec), tiny.prompt_tokens(spec)
    asked = [tokens[part] for part in prompts]
    running = engine.running(path, enforce_eager=True, max_num_batched_tokens=max(sizes), **options)
    with dispatch.use(ops), running as llm:
        expected = engine.decode(llm, asked, new_tokens)
        manager = capture(llm, "FULL_AND_PIECEWISE", sizes)
        assert manager.cudagraph_mode.name == "FULL_AND_PIECEWISE"
        most = options.get("max_num_seqs", 8)
        assert sorted(graph.num_tokens for graph in manager.graphs) == [size for size in sizes if size <= most]
        whole = list(manager.graphs.values())
        pieces = [graph for graph in CpuGraph.made if graph not in whole]
        assert len(pieces) == len(sizes) * (spec.config.num_hidden_layers + 1), "attention is not between graphs"
        actual = engine.decode(llm, asked, new_tokens)
    for (tokens, table), (expected_tokens, expected_table) in zip(actual, expected, strict=True):
        assert tokens == expected_tokens
        # Triton's attention divides its keys by how many there may be, which is more in a graph.
        assert (table - expected_table).abs().max() <= (0 if ops == "auto" else TOLERANCE)
    assert sum(graph.replays for graph in whole) >= new_tokens - 3, "decoding steps were computed anew"
    assert sum(graph.replays for graph in pieces) > spec.config.num_hidden_layers, "other steps were computed anew"
