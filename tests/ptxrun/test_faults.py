"""Every kind of fault is found, and nothing else is reported with it."""

import numpy as np
import pytest

from testing.ptxrun.executable import Fault, Schedule, WarpOrder

from .harness import launch


FAULTS = {
    "warp that does not end": "AGAIN:\nbra AGAIN;",
    "global access outside of every tensor": "ld.global.b32 %x, [%p0+128];",
    "misaligned access": "ld.global.v2.b32 {%x, %y}, [%p0+4];",
    "shared access outside of the block's memory": "mov.u32 %x, memory;\nst.shared.b32 [%x+256], %t;",
    "read of uninitialised shared memory": "mov.u32 %x, memory;\nld.shared.b32 %y, [%x];",
    "lanes of a warp share memory without bar.warp.sync":
        "mov.u32 %x, memory;\nmad.lo.u32 %x, %t, 4, %x;\nst.shared.b32 [%x], %t;\nxor.b32 %x, %x, 4;\nld.shared.b32 %y, [%x];",
    "barrier that not all live lanes reach": "setp.lt.u32 %c, %t, 7;\n@%c bra OUT;\nbar.sync 0;\nOUT:",
    "warp operation that not all its lanes reach": "setp.lt.u32 %c, %t, 7;\n@%c shfl.sync.bfly.b32 %x, %t, 1, 31, -1;",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    body = ".reg .b32 %x, %y;\n.reg .pred %c;\n" + FAULTS[fault]
    found = launch(body, [np.zeros(32, np.uint32)], shared=256).findings
    assert [f.fault for f in found] == [fault]
