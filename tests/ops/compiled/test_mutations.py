"""Mistakes in the kernels are noticed: by a finding, or because the result is not the oracle's."""

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import inputs
from benchmarks.attention.writes import compress_case, insert_case
from benchmarks.roofline import Bench, WrongResultError
from testing.ops import compiled as cases
from testing.ops.cuda_experts import INT4, Problem
from testing.ops.numeric import assert_within, normal
from testing.ptxrun import cuda_kernels, triton_kernels
from testing.ptxrun.executable import Schedule
from testing.ptxrun.mutate import (
    ALTERATIONS,
    OneTooMany,
    ShortIndices,
    WithoutMasks,
    altered,
    instructions,
    module_with,
    without,
)
from testing.ptxrun.verify import verified
from vllm_deepseek_v4flash.ops.cuda import packed_experts as cuda

SM_80 = 80


def is_noticed(case, execute):
    try:
        actual, _ = verified(case.compute, execute, case.schedules[:1])
        case.check(actual)
    except (AssertionError, WrongResultError):
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
    start, end = (re.search(text, ptx) for text in (r"cp\.async\.c[ag]", r"cp\.async\.wait_group"))
    found = []
    for number, place in enumerate(instructions(ptx, opcode)[:most]):
        if opcode == "bar.sync" and start and end and start.start() < place.start() < end.start():
            continue  # Triton's, between the pipeline's first copies, which go to different pieces

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


def benchmark(make, rng):
    """A kernel benchmark's case, which checks itself."""
    torch.manual_seed(0)
    work = make().build(Bench(CPU, dry=True, memory_bytes=1 << 30))

    def compute():
        work.check()
        return ()

    return cases.Case(compute, lambda actual: None)


SIZES = dataclasses.replace(inputs.FLASH, contexts=(1 << 13,), ranks=(1,))
CPU = torch.device("cpu")
COPIES = "The masks keep lanes that hold copies from storing them again."
FITS = "The sizes fill the tiles."
SHIFT = "A softmax does not depend on the number that is subtracted from all logits."
NO_ROTATION = "The case rotates by zero, so that its scores are whole numbers."
UNNOTICED = {
    ("_mix_streams", "sums in bf16"): "The oracle's bound is the worst case of 16,384 fp32 roundings.",
    ("_mix_streams", "one too few"): FITS,
    ("_enter_sublayer", "loads without their masks"): FITS,
    ("_enter_sublayer", "stores without their masks"): COPIES,
    ("_enter_sublayer", "minima for maxima"): SHIFT,
    ("_attend", "stores without their masks"): COPIES,
    ("_merge", "stores without their masks"): COPIES,
    ("_merge", "minima for maxima"): SHIFT,
    ("_merge", "sums for differences"): SHIFT,
    ("_prepare", "stores without their masks"): COPIES,
    ("_prepare", "one too many"): FITS,
    ("_prepare", "one too few"): FITS,
    ("_prepare", "sums for differences"): NO_ROTATION,
    ("_prepare", "products without sums"): NO_ROTATION,
    ("_prepare", "the other of two values"): NO_ROTATION,
    ("_score_shared", "stores without their masks"): COPIES,
    ("_score_shared", "sums in bf16"): "The case's sums are whole numbers that bf16 holds.",
    ("_score_shared", "one too few"): FITS,
    ("_select", "matrices from the next row of 16 bytes"): "The case does not execute them.",
    ("_linear", "one too few"): "The ring of copies has one piece less, which still holds all that are under way.",
    ("_qnorm_rope_kv_insert", "one too few"): "What is compared with 447 are multiples of 8.",
    ("_sum", "loads without their masks"): FITS,
    ("_sum", "stores without their masks"): FITS,
    ("_sum", "one too many"): FITS,
}
"""Alterations that change no result, or too little."""
LEAST = 10
"""Alterations of a family that are noticed."""
FAMILIES: dict[str, list[Callable[[torch.Generator], cases.Case]]] = {
    "norm and router": [cases.rms_norm, cases.route],
    "mHC": [cases.mhc_pre],
    "attention": [cases.sparse_attention],
    "indexer": [cases.indexer_topk],
    "experts": [cases.packed_experts],
    "linears": [cases.packed_linear],
    "compressor": [functools.partial(benchmark, lambda: compress_case(SIZES, "CSA", 2, 1))],
    "cache rows": [functools.partial(benchmark, lambda: insert_case(SIZES, 3))],
}


def altered_kernels(case):
    """For each kernel of a case and each alteration that it has a place for, whether it is noticed."""
    with triton_kernels.executed(SM_80) as runs:
        case.compute()
    found = {}
    for kernel, ptx in {run.kernel: run.ptx for run in runs}.items():
        for alteration, (pattern, _) in ALTERATIONS.items():
            if re.search(pattern, ptx):

                def change(name, text, kernel=kernel, alteration=alteration):
                    return altered(text, alteration) if name == kernel else text

                compiler = triton_kernels.Compiler(SM_80, change)
                execute = functools.partial(triton_kernels.executed, SM_80, instead=compiler)
                found[kernel, alteration] = is_noticed(case, execute)
    return found


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "norm and router" else pytest.mark.slow) for name in FAMILIES]
)
def test_alterations(rng, family):
    """Waits, barriers and masks left out, wrong swizzles, fragments, lanes, comparisons, accumulators in bf16..."""
    found: dict[tuple[str, str], bool] = {}
    for case in FAMILIES[family]:
        found |= altered_kernels(case(rng))
    assert {key for key, noticed in found.items() if not noticed} == UNNOTICED.keys() & found.keys()
    assert sum(found.values()) >= LEAST


def test_an_index_in_32_bits(rng):
    """Rows that are 2^30 elements from each other; memory that is not touched takes none."""
    x = torch.empty((3 << 30) + 512, dtype=torch.bfloat16).as_strided((4, 512), (1 << 30, 1))
    x.copy_(normal(rng, 4, 512, dtype=torch.bfloat16))
    weight = normal(rng, 512, dtype=torch.bfloat16)
    module = cases.module_of("rms_norm")
    expected = normed(x.contiguous(), weight, module)
    assert torch.equal(normed(x, weight, module), expected)
    with pytest.raises(AssertionError, match="global access outside of every tensor"):
        normed(x, weight, module_with(module.__name__, ShortIndices()))


def normed(x, weight, module):
    execute = functools.partial(triton_kernels.executed, SM_80, instead=triton_kernels.Compiler(SM_80))
    return verified(lambda: module.rms_norm(x, weight, 1e-6), execute, (Schedule(),))[0]


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
    "a wrong swizzle": (
        "product.cuh", "[row][swizzled(row, number)])[t];", "[row][number])[t];",
    ),
    "the swizzle of another row": (
        "product.cuh", "at = swizzled(row, lane % 8);", "at = swizzled(row + 1, lane % 8);",
    ),
    "an accumulator in bf16": (
        "product.cuh", "sums[0] += upper * part[0];",
        "sums[0] = gpu::float_of_bits(gpu::bits_of_float(sums[0] + upper * part[0]) & 0xFFFF0000u);",
    ),
    "a mask left out": (
        "experts.cu", "if (2 * t + side >= chunk.count) continue;\n    float* at", "float* at",
    ),
    "the next token's activations": ("experts.cu", "chunk.tokens[g])", "chunk.tokens[g ^ 1])"),
    "a copy into the piece that is read": (
        "product.cuh", "(piece + kStages - 1) % kStages);", "(piece + kStages) % kStages);",
    ),
    "another row's scale": ("product.cuh", "at.queue.scales[lower][step]", "at.queue.scales[upper][step]"),
    "no fence": ("experts.cu", "gpu::fence();", ""),
    "a wrong nibble": ("weights.cuh", "word >> 4 * kPair, 0x000F000Fu", "word >> (4 * kPair + 1), 0x000F000Fu"),
}  # fmt: skip


UNNOTICED_IN_CUDA = {
    "none": "It is no mistake.",
    "an accumulator in bf16": "The bound is the worst case of 8,192 fp32 roundings; a segment has 32 sums.",
    "no fence": "The executor runs one block after another: memory order between blocks is not modelled.",
}
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
    assert is_noticed(case, execute) == (mistake not in UNNOTICED_IN_CUDA)
