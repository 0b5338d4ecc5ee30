"""The GPU path inside vLLM, on a CPU: the V2 model runner and every Triton kernel, interpreted.

Collected only where `tests/test_v2_runner.py` has switched both on. What is served must be what the same runner serves
with the PyTorch references.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from testing import engine, tiny
from testing.fixtures import unpacked
from testing.parity import TOLERANCE
from vllm_deepseek_v4flash.ops import dispatch

TRITON = Path(dispatch.__file__).parent / "triton"
TWINS = {path.stem for path in TRITON.glob("*.py")} & {path.stem for path in (TRITON.parent / "reference").glob("*.py")}
NEW_TOKENS = 3
PACKED = "llmc_rtn_g32_asym"
# Chunks that end inside windows of both ratios, and several requests in a step.
OPTIONS = {"max_num_batched_tokens": 70, "enable_prefix_caching": True}


@contextmanager
def ops(choice: str, *referenced: str) -> Iterator[dict[str, str]]:
    """Run with these ops, but the `referenced` by PyTorch; yields which backend each op that ran has run on."""
    used: dict[str, str] = {}

    def resolve(op: str, device_type: str) -> Any:
        used[op] = "reference" if op in referenced else dispatch._backend_of(op, device_type)
        return getattr(importlib.import_module(f"{dispatch.__package__}.{used[op]}.{op}"), op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.OPS_ENV, choice)
        patch.setattr(dispatch, "_resolve", resolve)
        yield used


def serve(path: Path, prompts: list[list[int]], **options: Any) -> list[tuple[list[int], torch.Tensor]]:
    with engine.running(path, **OPTIONS, **options) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        return engine.decode(llm, prompts, NEW_TOKENS)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param("topk", {}, id="indexer-fp32"),
        pytest.param("topk", {"kv_cache_dtype": "fp8"}, id="indexer-fp8", marks=pytest.mark.slow),
        pytest.param(
            "topk", {"kv_cache_dtype": "fp8", "additional_config": {"index_cache_dtype": "fp4"}}, id="indexer-fp4"
        ),
        pytest.param("mixed", {}, id="flash-pattern-fp32", marks=pytest.mark.slow),
        pytest.param("mixed", {"kv_cache_dtype": "fp8"}, id="flash-pattern-fp8"),
    ],
)
def test_kernels_serve_what_the_references_serve(tmp_path: Path, config: str, options: dict[str, Any]) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    spec = tiny.CONFIGS[config]
    path = tiny.write_checkpoint(tmp_path / "model", spec)
    tokens = tiny.prompt_tokens(spec)
    # Past the first ratio-128 window where there is one, and a short one beside it.
    prompts = [tokens[:140] if 128 in spec.config.compress_ratios else tokens[:75], tokens[20:43]]
    with ops("reference") as used:
        expected = serve(path, prompts, **options)
    assert set(used.values()) == {"reference"}
    # Interpreting the experts as well would take four times as long; the other tests do.
    with ops("triton", "fused_experts") as used:
        actual = serve(path, prompts, **options)
    assert {op for op, backend in used.items() if backend == "triton"} == TWINS & set(used) - {"fused_experts"}
    assert "sparse_attention" in TWINS & set(used)
    for (tokens_, table), (expected_tokens, expected_table) in zip(actual, expected, strict=True):
        assert tokens_ == expected_tokens
        if "kv_cache_dtype" not in options:
            # With fp8 rows a value next to a code's border may fall on the other side, which is a step of 6 %.
            assert (table - expected_table).abs().max() <= TOLERANCE


@pytest.mark.parametrize("weights", ["plain", "packed"])
def test_experts_are_computed_by_kernels(tmp_path: Path, weights: str) -> None:
    """Plain, or 4-bit with zero points as a real quantiser wrote them, linears included."""
    if weights == "plain":
        spec = tiny.CONFIGS["topk"]
        path, tokens = tiny.write_checkpoint(tmp_path / "model", spec), tiny.prompt_tokens(spec)
    else:
        path = unpacked() / PACKED
        tokens = load_file(unpacked() / f"{PACKED}.ref" / "logits.safetensors")["input_ids"].flatten().tolist()
    with ops("reference"):
        ((expected_tokens, expected_table),) = serve(path, [tokens[:12]])
    with ops("triton") as used:
        ((actual_tokens, actual_table),) = serve(path, [tokens[:12]])
    kernels = {"fused_experts"} if weights == "plain" else {"packed_experts", "packed_linear"}
    assert {used[op] for op in kernels} == {"triton"}
    assert actual_tokens == expected_tokens
    assert (actual_table - expected_table).abs().max() <= TOLERANCE
