"""Every kernel benchmark's case at DeepSeek-V4-Flash's shapes, with the case's bound."""

import dataclasses

import pytest
import torch

from benchmarks import flash_cases, inputs, moe
from benchmarks.attention.indexer import indexer_case, topk_case
from benchmarks.attention.sparse import attention_case
from benchmarks.attention.streams import mhc_head_case, mhc_post_pre_case, route_case
from benchmarks.attention.writes import compress_case, insert_case
from benchmarks.flash_cases import INNER
from benchmarks.roofline import Bench
from testing.ops import compiled
from testing.ptxrun.executable import Schedule
from testing.ptxrun.verify import unexpected

SIZES = dataclasses.replace(inputs.FLASH, contexts=(1 << 13,), ranks=(1,))
FEW_EXPERTS = dataclasses.replace(moe.FLASH, experts=16)
ALL_EXPERTS = dataclasses.replace(moe.FLASH, hidden=1024, inners=(512,))
NARROW_EXPERTS = dataclasses.replace(FEW_EXPERTS, hidden=1024, inners=(512,))
CHECK_EVERY = 5
"""Blocks: shared memory is checked in some, which takes half of the time."""


def op_of(case):
    """A case of the experts has the name of their weights instead."""
    return "packed_experts" if case.op in flash_cases.WEIGHTS else case.op


def benchmark_cases():
    for rows in ("fp8", "plain"):
        yield attention_case(SIZES, "window", rows, 1, 1, 1 << 13, 1)
        for kind in ("CSA", "HCA"):
            for requests, tp in ((1, 1), (8, 1), (1, 8)):
                yield attention_case(SIZES, kind, rows, requests, 1, 1 << 13, tp)
            yield attention_case(SIZES, kind, rows, 1, 64, 1 << 12, 1)
    for rows in ("fp8", "fp4"):
        for requests, new in ((1, 1), (8, 1), (1, 64)):
            yield indexer_case(SIZES, rows, requests, new, 1 << 13)
    for context in (1 << 17, 1 << 20):
        yield attention_case(SIZES, "CSA", "fp8", 1, 1, context, 1)
        yield attention_case(SIZES, "HCA", "fp8", 1, 1, context, 1)
        yield indexer_case(SIZES, "fp8", 1, 1, context)
    yield topk_case(dataclasses.replace(SIZES, candidates=1 << 15), 2)
    for tokens in (1, 8, 200):
        yield mhc_post_pre_case(SIZES, tokens)
        yield mhc_head_case(SIZES, tokens)
    for cache in ("CSA", "HCA", "keys"):
        yield compress_case(SIZES, cache, 2, 1)
        yield compress_case(SIZES, cache, 2, 1, False)
        yield compress_case(SIZES, cache, 1, 256)
    for tokens in (1, 8):
        yield insert_case(SIZES, tokens)
        yield route_case(SIZES, tokens)
    for weight in ("int4", "fp4"):
        yield moe.experts_case(ALL_EXPERTS, weight, 512, 96, "triton")
        for tokens in (1, 8, 64, 600):
            sizes, inner = (FEW_EXPERTS, INNER) if tokens < 64 else (NARROW_EXPERTS, 512)
            yield moe.experts_case(sizes, weight, inner, tokens, "triton")


def test_every_op_is_executed_as_compiled():
    executed = {op_of(case) for case in benchmark_cases()} | {name.partition(",")[0] for name in compiled.CASES}
    assert {case.op for case in flash_cases.CASES} <= executed


@pytest.mark.slow
@pytest.mark.parametrize("execute", [80, 90], ids=["sm_80", "sm_90"], indirect=True)
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.op}: {case.label}") for case in benchmark_cases()])
def test_case(execute, case):
    torch.manual_seed(0)
    bench = Bench(torch.device("cpu"), dry=True, memory_bytes=4 << 30)
    with execute(schedule=Schedule(check_every=CHECK_EVERY)) as runs:
        case.build(bench).check()
    assert runs
    found = [f"{run.kernel}: {finding}" for run in runs for finding in unexpected(run)]
    assert not found, "\n".join(found)
