"""What is counted of launches, and the bounds that follow."""

import numpy as np
import pytest

from testing.ptxrun import machine_code, snippets
from testing.ptxrun.executable import Schedule
from testing.ptxrun.gpus import GPUS
from testing.ptxrun.profile import profile
from testing.ptxrun.triton_kernels import Run

A100, RTX_3090, H100 = GPUS["A100"], GPUS["RTX 3090"], GPUS["H100"]
LOAD = ".reg .b32 %x;\n.reg .b64 %q;\nmad.wide.u32 %q, %t, {step}, %p0;\nld.global.b32 %x, [%q];\n"
KEEP = "mad.wide.u32 %q, %t, 4, %p1;\nst.global.b32 [%q], %x;\n"


def zeros(count, dtype=np.uint32):
    """At the start of a sector."""
    size = count * np.dtype(dtype).itemsize
    held = np.zeros(size + 64, np.uint8)
    start = -held.ctypes.data % 64
    return held[start : start + size].view(dtype)


def run(body, arrays, *, threads=32, grid=1, shared=0, schedule=None):
    result = snippets.launch(body, arrays, threads=threads, grid=grid, shared=shared, schedule=schedule)
    return Run("k", (grid, 1, 1), result, shared, snippets.ptx(body, len(arrays), threads))


@pytest.mark.parametrize(("step", "sectors", "wasted"), [(4, 4, 0.0), (8, 8, 0.5), (32, 32, 0.875), (64, 32, 0.875)])
def test_traffic(step, sectors, wasted):
    arrays = [zeros(32 * step, np.uint8), zeros(32)]
    found = profile(run(LOAD.format(step=step) + KEEP, arrays)).traffic
    stored = 4  # sectors, without waste
    assert found.requests == 2
    assert found.sectors == sectors + stored
    assert found.wasted == pytest.approx(wasted * sectors / (sectors + stored))
    assert found.moved == 32 * (sectors + stored)


@pytest.mark.parametrize(("step", "conflicts"), [(4, 1), (8, 2), (128, 32)])
def test_bank_conflicts(step, conflicts):
    body = f".reg .b32 %s;\nmov.u32 %s, memory;\nmad.lo.u32 %s, %t, {step}, %s;\nst.shared.b32 [%s], %t;\n"
    found = profile(run(body, [zeros(1)], shared=32 * step))
    assert found.wavefronts / found.ideal_wavefronts == conflicts
    assert bool(found.worst) == (conflicts > 1)


def test_sampled_blocks_stand_for_the_grid():
    arrays = [zeros(32), zeros(32)]
    whole, sampled = (
        profile(run(LOAD.format(step=4) + KEEP, arrays, grid=12, schedule=Schedule(block_step=step))) for step in (1, 3)
    )
    assert sampled.blocks == whole.blocks == 12
    assert sampled.issued == pytest.approx(whole.issued)
    assert sampled.traffic.sectors == pytest.approx(whole.traffic.sectors)
    # The blocks share their tensors, which have 128 bytes each.
    assert sampled.traffic.moved <= 256


LOOP = """
.reg .b32 %i, %x; .reg .pred %c; .reg .b64 %q;
.loc 1 1 0
mov.u32 %i, 0;
mov.u32 %x, %t;
again:
.pragma "nounroll";
.loc 1 2 0
mul.lo.u32 %x, %x, %x;
xor.b32 %x, %x, 77;
.loc 1 3 0
add.u32 %i, %i, 1;
setp.lt.u32 %c, %i, {times};
@%c bra again;
.loc 1 4 0
mad.wide.u32 %q, %t, 4, %p0;
st.global.b32 [%q], %x;
"""


def test_machine_instructions_count_as_often_as_their_line_ran():
    few, many = (_issued_by_loop(times) for times in (1000, 3000))
    assert many / few == pytest.approx(3, rel=0.01)


def _issued_by_loop(times):
    body, out = LOOP.format(times=times), [zeros(64)]
    result = snippets.launch(body, out, threads=64)
    for instruction in result.program.kernel.instructions:
        if instruction.source is not None:
            instruction.source = ("loop.cu", instruction.source[1])
    return sum(machine_code.issued(result, snippets.ptx(body, 1, 64) + '.file 1 "loop.cu"\n').values())


def test_straight_code_is_counted_exactly():
    one = run(LOAD.format(step=4) + KEEP, [zeros(64), zeros(64)], threads=64, grid=3)
    code = machine_code.assemble(one.ptx, "k")
    assert sum(machine_code.issued(one.result, one.ptx).values()) == code.instructions * 2 * 3
    assert code.registers > 0
    assert code.shared == 0


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "a100", "rtx_3090", "h100"),
    [
        pytest.param(8, 254, 65536, 1, 1, 1, id="registers"),
        pytest.param(4, 87, 64556, 2, 1, 3, id="shared memory"),
        pytest.param(1, 16, 0, 32, 16, 32, id="blocks"),
        pytest.param(16, 32, 0, 4, 3, 4, id="warps"),
    ],
)
def test_resident_blocks(warps, registers, shared, a100, rtx_3090, h100):
    found = [gpu.blocks_per_multiprocessor(warps, registers, shared) for gpu in (A100, RTX_3090, H100)]
    assert found == [a100, rtx_3090, h100]


def test_bounds_are_those_of_the_busiest_multiprocessor():
    arrays = [zeros(32), zeros(32)]
    one, full, more = (
        profile(run(LOAD.format(step=4) + KEEP, arrays, grid=grid, schedule=Schedule(block_step=grid)))
        for grid in (1, 108, 109)
    )
    assert one.bounds_us(A100) == pytest.approx(full.bounds_us(A100))
    assert more.bounds_us(A100)["issue"] == pytest.approx(2 * one.bounds_us(A100)["issue"])
    assert one.bounds_us(A100)["issue"] == pytest.approx(one.instructions / 4 / 1.41e3)
