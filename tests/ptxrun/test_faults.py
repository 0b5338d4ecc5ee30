"""Every kind of fault is found where it is, in any order of warps, and without it nothing is reported."""

import numpy as np
import pytest

from testing.ptxrun.executable import Fault, Schedule, WarpOrder
from testing.ptxrun.snippets import launch

# (faulty, correct); %x and %y are registers, %c a predicate, `memory` is 256 bytes of shared memory, %p0 32 words.
MINE = "mov.u32 %x, memory;\nmad.lo.u32 %x, %t, 4, %x;\n"
COPY = "mov.u32 %x, memory;\nmad.lo.u32 %x, %t, 4, %x;\ncp.async.ca.shared.global [%x], [%p0], 4;\n"
COPIED = f"{COPY}cp.async.commit_group;\n"
WAIT = "cp.async.wait_group 0;\n"
KERNELS = {
    Fault.GLOBAL_OUT_OF_BOUNDS: ("ld.global.b32 %x, [%p0+128];", "ld.global.b32 %x, [%p0+124];"),
    Fault.MISALIGNED: ("ld.global.v2.b32 {%x, %y}, [%p0+4];", "ld.global.v2.b32 {%x, %y}, [%p0+8];"),
    Fault.SHARED_OUT_OF_BOUNDS: (
        "mov.u32 %x, memory;\nst.shared.b32 [%x+256], 1;", "mov.u32 %x, memory;\nst.shared.b32 [%x+252], 1;",
    ),
    Fault.SHARED_UNINITIALISED: (
        f"{MINE}ld.shared.b32 %y, [%x];", f"{MINE}st.shared.b32 [%x], %t;\nld.shared.b32 %y, [%x];",
    ),
    Fault.WARP_HAZARD: (
        f"{MINE}st.shared.b32 [%x], %t;\nxor.b32 %x, %x, 4;\nld.shared.b32 %y, [%x];",
        f"{MINE}st.shared.b32 [%x], %t;\nxor.b32 %x, %x, 4;\nbar.warp.sync -1;\nld.shared.b32 %y, [%x];",
    ),
    Fault.PENDING_COPY_WRITE: (
        f"{COPIED}st.shared.b32 [%x], 1;\n{WAIT}", f"{COPIED}{WAIT}st.shared.b32 [%x], 1;\n",
    ),
    Fault.PENDING_COPY_READ: (f"{COPIED}ld.shared.b32 %y, [%x];\n{WAIT}", f"{COPIED}{WAIT}ld.shared.b32 %y, [%x];\n"),
    Fault.UNWAITED_COPY: (COPIED, f"{COPIED}{WAIT}"),
    Fault.INCOMPLETE_BARRIER: (
        "setp.lt.u32 %c, %t, 7;\n@%c bra OUT;\nbar.sync 0;\nOUT:", "setp.lt.u32 %c, %t, 7;\n@%c ret;\nbar.sync 0;",
    ),
    Fault.INCOMPLETE_WARP: (
        "setp.lt.u32 %c, %t, 7;\n@%c shfl.sync.bfly.b32 %x, %t, 1, 31, -1;",
        "setp.lt.u32 %c, %t, 8;\n@%c shfl.sync.bfly.b32 %x, %t, 1, 31, 255;",
    ),
    Fault.ENDLESS: ("AGAIN:\nbra AGAIN;", "bra AGAIN;\nAGAIN:"),
}  # fmt: skip


def found_in(body, threads=32, **schedule):
    body = ".reg .b32 %x, %y;\n.reg .pred %c;\n" + body
    result = launch(body, [np.zeros(32, np.uint32)], shared=256, threads=threads, schedule=Schedule(**schedule))
    return [finding.fault for finding in result.findings]


@pytest.mark.parametrize("fault", KERNELS)
def test_one_warp(fault):
    faulty, correct = KERNELS[fault]
    assert found_in(faulty) == [fault]
    assert found_in(correct) == []


def exchange(*, before, after):
    """Each of 64 threads writes a word, reads the word of the thread 32 after it, then writes its own again."""
    body = f"{MINE}st.shared.b32 [%x], %t;\n{before}xor.b32 %x, %x, 128;\nld.shared.b32 %y, [%x];\n{after}"
    return body + "xor.b32 %x, %x, 128;\nst.shared.b32 [%x], %y;\n"


@pytest.mark.parametrize("order", WarpOrder)
@pytest.mark.parametrize(("before", "after"), [(True, True), (False, True), (True, False)])
def test_races_between_warps(order, before, after):
    body = exchange(before="bar.sync 0;\n" if before else "", after="bar.sync 0;\n" if after else "")
    found = found_in(body, threads=64, warp_order=order)
    if before and after:
        assert found == []
    else:
        assert Fault.SHARED_RACE in found


def test_warps_that_store_equal_values_to_one_address_do_not_race():
    def store(value):
        return f"mov.u32 %x, memory;\nst.shared.b32 [%x], {value};\n"

    assert found_in(store("7"), threads=64) == []
    assert Fault.WARP_HAZARD in found_in(store("%t"), threads=64)
    assert Fault.SHARED_RACE in found_in(store("%t"), threads=64)


def test_a_finding_says_where_and_how_often():
    (finding,) = launch(".reg .b32 %x;\nld.global.b32 %x, [%p0+128];", [np.zeros(32, np.uint32)], grid=3).findings
    assert (finding.block, finding.warp, finding.lane, finding.count) == (0, 0, 0, 96)
    assert "global access outside of every tensor: `ld.global.b32 %x, [%p0+128]` at ?, PTX line" in str(finding)


def test_only_every_nth_block_is_checked():
    faulty, _ = KERNELS[Fault.SHARED_UNINITIALISED]
    body = f".reg .b32 %x, %y;\n{faulty}"
    for every, blocks in ((1, 7), (3, 3), (0, 0)):
        result = launch(body, [], shared=256, grid=7, schedule=Schedule(check_every=every))
        assert sum(finding.count for finding in result.findings) == 4 * 32 * blocks
