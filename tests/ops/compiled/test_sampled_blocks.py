"""Whole layers at sizes that take too long to run to the end: of each large grid some blocks run, without findings."""

import pytest

from benchmarks.flash_cases import WEIGHTS
from benchmarks.kernel_report.layer import Point
from benchmarks.kernel_report.trace import Tracer
from testing.poison import without_poison
from vllm_deepseek_v4flash.config import LayerKind


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("point", [Point(new=8192), Point(8, 1 << 17), Point(2, 1 << 20)], ids=str)
def test_no_findings(nvcc, arch, point):
    """256 experts, all widths as they are; every fifth block's shared memory is checked."""
    tracer = Tracer(arch, 2, WEIGHTS["int4"], check_every=5)
    with without_poison():
        for kind in LayerKind:
            assert tracer.trace(kind, point)
    assert not tracer.findings
    assert tracer.store.executed
