"""The GPU path inside vLLM, on a CPU: the V2 model runner and every Triton kernel, interpreted.

Collected only when `tests/test_v2_runner.py` has switched both on. One engine runs the same requests with the PyTorch
references and with the kernels; the answers must be the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
from vllm_deepseek_v4flash.ops.fused_experts import fused_experts

OPS = {op.__name__: op for op in dispatch.ops()}
WITH_KERNEL = {path.stem for path in (Path(dispatch.__file__).parent / "triton").glob("*.py")} & OPS.keys()
NEW_TOKENS = 3
PACKED = "llmc_rtn_g32_asym"
# Chunks that end inside windows of both ratios, and several requests in a step.
OPTIONS = {"max_num_batched_tokens": 70, "enable_prefix_caching": True}


@contextmanager
def ops(choice: str, *referenced: dispatch.Op[..., Any]) -> Iterator[dict[str, str]]:
    """Run with these ops, except for the references of `referenced`; yields the backend of each op that ran."""
    ran: dict[str, str] = {}

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        backend = dispatch.backend_of(OPS[name], torch.device("cpu"))

        def call(*args: Any, **options: Any) -> Any:
            ran[name] = backend
            return function(*args, **options)

        return call

    with dispatch.use(choice, reference=referenced), dispatch.wrap(noting):
        yield ran


@contextmanager
def running(path: Path, **options: Any) -> Iterator[Callable[[list[list[int]]], list[tuple[list[int], torch.Tensor]]]]:
    """An engine; yields what runs prompts on it, with nothing cached, and returns their tokens and distributions."""
    with engine.running(path, **OPTIONS, **options) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner

        def run(prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
            assert llm.reset_prefix_cache()
            return engine.decode(llm, prompts, NEW_TOKENS)

        yield run


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
def test_kernels_answer_what_the_references_answer(tmp_path: Path, config: str, options: dict[str, Any]) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    spec = tiny.CONFIGS[config]
    path = tiny.write_checkpoint(tmp_path / "model", spec)
    tokens = tiny.prompt_tokens(spec)
    # Beyond the first ratio-128 window if there is one, together with a short one.
    prompts = [tokens[:140] if 128 in spec.config.compress_ratios else tokens[:75], tokens[20:43]]
    with running(path, **options) as run:
        with ops("reference") as used:
            expected = run(prompts)
        assert set(used.values()) == {"reference"}
        # Interpreting the experts too would take four times as long; the other tests do that.
        with ops("triton", fused_experts) as used:
            actual = run(prompts)
    assert {op for op, backend in used.items() if backend == "triton"} == WITH_KERNEL & set(used) - {"fused_experts"}
    assert "sparse_attention" in WITH_KERNEL & set(used)
    for (tokens_, table), (expected_tokens, expected_table) in zip(actual, expected, strict=True):
        assert tokens_ == expected_tokens
        if "kv_cache_dtype" not in options:
            # With fp8 rows a value next to the border of two codes may go to either, which is a step of 6 %.
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
    with running(path) as run:
        with ops("reference"):
            ((expected_tokens, expected_table),) = run([tokens[:12]])
        with ops("triton") as used:
            ((actual_tokens, actual_table),) = run([tokens[:12]])
    kernels = {"fused_experts"} if weights == "plain" else {"packed_experts", "packed_linear"}
    assert {used[op] for op in kernels} == {"triton"}
    assert actual_tokens == expected_tokens
    assert (actual_table - expected_table).abs().max() <= TOLERANCE
