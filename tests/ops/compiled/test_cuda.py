"""csrc/experts.cu as nvcc compiles it."""

import functools

import pytest

from testing.ops.cuda_experts import SCHEMES, Problem
from testing.ops.numeric import assert_within
from testing.ptxrun import cuda_kernels
from testing.ptxrun.verify import SCHEDULES, verified
from vllm_deepseek_v4flash.ops.cuda import packed_experts as cuda

FLASH_INT4, FLASH_FP4 = SCHEMES["int4, groups of 32, fp16"], SCHEMES["fp4"]


@pytest.mark.parametrize(
    ("scheme", "sizes"),
    [
        pytest.param(FLASH_INT4, {"hidden": 1408, "inner": 96}, id="int4, rows and columns that fill no tile"),
        pytest.param(FLASH_INT4, {"hidden": 4352, "inner": 32, "tokens": 1}, id="int4, queues that wrap around"),
        pytest.param(FLASH_FP4, {"hidden": 1408, "inner": 96}, id="fp4"),
        pytest.param(FLASH_INT4, {"ids": [[1]] * 9}, id="more pairs of an expert than a block takes"),
        pytest.param(SCHEMES["int4, groups of 64, zeros, bf16"], {"first": 1}, id="zeros, experts of other ranks"),
    ],
)
def test_experts(nvcc, rng, monkeypatch, scheme, sizes):
    monkeypatch.setattr(cuda, "triton_packed_experts", None)  # nothing may be left to Triton
    problem = Problem(rng, "cpu", scheme, **sizes)
    actual, runs = verified(problem.run, functools.partial(cuda_kernels.executed, 80), SCHEDULES)
    assert [run.kernel for run in runs] == ["prepare", "gate_up", "down"]
    assert_within(actual, *problem.expected())
