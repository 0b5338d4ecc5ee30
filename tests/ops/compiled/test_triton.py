"""Triton kernels: no findings, the same bits in every order of warps and blocks, and the result is the oracle's."""

from functools import partial

import pytest

from testing.ops import compiled as cases
from testing.ptxrun.verify import verified

SM_80, SM_90 = 80, 90
SLOW = pytest.mark.slow
CASES = {
    "rms_norm, width 512": (cases.rms_norm, SM_80, SM_90),
    "rms_norm, width 1024": (partial(cases.rms_norm, width=1024), SM_80, SM_90),
    "rms_norm, width 4096": (partial(cases.rms_norm, width=4096), SM_80, SM_90),
    "route": (cases.route, SM_80, SM_90),
    "mhc_pre": (cases.mhc_pre, SM_80),
    "mhc_post": (cases.mhc_post,),
    "swiglu": (cases.swiglu, SM_80),
    "rope_table": (cases.rope_table, SM_80),
    "sparse_attention, fp8 rows": (cases.sparse_attention, SM_80, SM_90),
    "indexer_topk, fp8 keys": (cases.indexer_topk, SM_80),
    "packed_experts, int4": (cases.packed_experts, SM_80),
    "packed_experts, fp4": (partial(cases.packed_experts, name="fp4"), SM_90),
    "packed_linear, int4": (cases.packed_linear, SM_80),
    "packed_linear, int4, 70 tokens": (partial(cases.packed_linear, tokens=70),),
    "packed_linear, fp4": (partial(cases.packed_linear, name="fp4"),),
    "fused_experts": (cases.fused_experts,),
}
"""What is computed, and for which architectures in the ordinary run."""


@pytest.mark.parametrize(
    ("execute", "case"),
    [
        pytest.param(arch, case, id=f"sm_{arch}-{name}", marks=() if arch in ordinary else SLOW)
        for name, (case, *ordinary) in CASES.items()
        for arch in (SM_80, SM_90)
    ],
    indirect=["execute"],
)
def test_against_the_oracle(execute, rng, case):
    made = case(rng)
    actual, _ = verified(made.compute, execute, made.schedules)
    made.check(actual)
