"""Mistakes in the kernels are noticed: by a finding, or because the result is not the oracle's."""

import functools
import shutil
from pathlib import Path

import pytest

from testing.ops import compiled as cases
from testing.ops.cuda_experts import INT4, Problem
from testing.ops.numeric import assert_within
from testing.ptxrun import cuda_kernels, triton_kernels
from testing.ptxrun.mutate import OneTooMany, WithoutMasks, instructions, module_with, without
from testing.ptxrun.verify import verified
from vllm_deepseek_v4flash.ops.cuda import packed_experts as cuda

SM_80 = 80


def is_noticed(case, execute):
    try:
        actual, _ = verified(case.compute, execute, case.schedules[:1])
        case.check(actual)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("mistake", [lambda: WithoutMasks("load"), lambda: WithoutMasks("store"), OneTooMany])
@pytest.mark.parametrize("op", ["rms_norm", "route"])
def test_mistakes_in_triton_sources(rng, op, mistake):
    """A missing mask, an index off by one."""
    module = module_with(cases.module_of(op).__name__, mistake())
    execute = functools.partial(triton_kernels.executed, SM_80, instead=triton_kernels.Compiler(SM_80))
    assert is_noticed(getattr(cases, op)(rng, module=module), execute)


def left_out(case, kernel, opcode, most=None):
    """For each instruction of one kernel with this opcode, whether it is missed."""
    with triton_kernels.executed(SM_80) as runs:
        case.compute()
    (ptx,) = {run.ptx for run in runs if run.kernel == kernel}
    found = []
    for number in range(len(instructions(ptx, opcode)[:most])):

        def change(name, text, number=number):
            return without(text, opcode, number) if name == kernel else text

        execute = functools.partial(triton_kernels.executed, SM_80, instead=triton_kernels.Compiler(SM_80, change))
        found.append(is_noticed(case, execute))
    return found


@pytest.mark.parametrize(
    ("case", "kernel", "opcode", "most"),
    [
        pytest.param(cases.rms_norm, "_rms_norm", "bar.sync", None, id="rms_norm, barriers"),
        pytest.param(cases.route, "_route", "bar.", None, id="route, barriers"),
        pytest.param(cases.packed_experts, "_gate_up", "cp.async.wait_group", None, id="experts, waits"),
        pytest.param(cases.packed_experts, "_gate_up", "bar.sync", 3, id="experts, first barriers"),
        pytest.param(
            cases.packed_experts, "_gate_up", "bar.sync", None, id="experts, barriers", marks=pytest.mark.slow
        ),
        pytest.param(
            cases.packed_experts, "_down", "cp.async.wait_group", None, id="down, waits", marks=pytest.mark.slow
        ),
        pytest.param(
            cases.mhc_pre, "_enter_sublayer", "bar.sync", None, id="mhc_pre, barriers", marks=pytest.mark.slow
        ),
    ],
)
def test_a_barrier_or_a_wait_left_out(rng, case, kernel, opcode, most):
    found = left_out(case(rng), kernel, opcode, most)
    assert found
    assert all(found), found


CUDA_MISTAKES = {
    "none": ("experts.cu", "", ""),
    "one wait too few": ("product.cuh", "gpu::wait<kStages - 2>();", "gpu::wait<kStages - 1>();"),
    "no sync_warp before the queue is read": (
        "product.cuh", "gpu::wait<kStages - 2>();\n    gpu::sync_warp();", "gpu::wait<kStages - 2>();",
    ),
    "no sync_warp between scales and products": (
        "product.cuh", "raw.store(queue, w.scale_type);\n      gpu::sync_warp();", "raw.store(queue, w.scale_type);",
    ),
    "no barrier in the plan": (
        "plan.cuh", "% kPairs == 0;\n  }\n  gpu::sync_block();", "% kPairs == 0;\n  }",
    ),
    "an index off by one": ("experts.cu", "place_of(first + g + i", "place_of(first + g + 1 + i"),
    "a segment left out": ("experts.cu", "s = 0; s < work.segments; ++s) sums", "s = 1; s < work.segments; ++s) sums"),
    "a swapped fragment": ("gpu.cuh", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
    "a wrong nibble": ("weights.cuh", "word >> 4 * kPair, 0x000F000Fu", "word >> (4 * kPair + 1), 0x000F000Fu"),
}  # fmt: skip


ORDINARY = ("one wait too few", "no sync_warp between scales and products")  # nvcc takes some seconds for each


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow) for name in CUDA_MISTAKES]
)
def test_mistakes_in_cuda_sources(nvcc, rng, monkeypatch, tmp_path, mistake):
    """More steps than the four warps' queues hold."""
    file, old, new = CUDA_MISTAKES[mistake]
    for path in cuda_kernels.SOURCE.parent.glob("*.cu*"):
        shutil.copy(path, tmp_path)
    source = (tmp_path / file).read_text()
    assert old in source
    (tmp_path / file).write_text(source.replace(old, new))
    monkeypatch.setattr(cuda, "triton_packed_experts", None)  # nothing may be left to Triton
    problem = Problem(rng, "cpu", INT4, hidden=4096, inner=96, tokens=2)
    case = cases.Case(problem.run, lambda actual: assert_within(actual, *problem.expected()))
    execute = functools.partial(cuda_kernels.executed, SM_80, source=Path(tmp_path) / "experts.cu")
    assert is_noticed(case, execute) == (mistake != "none")
