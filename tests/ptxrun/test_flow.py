"""Divergence, barriers, and the order of warps and blocks."""

import numpy as np
import pytest

from testing.ptxrun.executable import Fault, Schedule, WarpOrder

from .harness import faults, launch

MINE = "mad.wide.u32 %q, %t, 4, "


def test_lanes_diverge_and_meet():
    """Every lane loops its own number of times, and some leave early."""
    out = np.full(32, 99, np.uint32)
    body = ".reg .b32 %n, %i, %m;\n.reg .pred %c, %e;\n.reg .b64 %q;\n" + f"{MINE}%p0;\n"
    body += "mov.u32 %n, 0;\nmov.u32 %i, 0;\nsetp.eq.u32 %e, %t, 5;\n@%e ret;\nLOOP:\n"
    body += "and.b32 %m, %i, 1;\nsetp.eq.u32 %c, %m, 0;\n@%c bra EVEN;\nadd.u32 %n, %n, 100;\nbra NEXT;\nEVEN:\n"
    body += "add.u32 %n, %n, 1;\nNEXT:\nadd.u32 %i, %i, 1;\nsetp.le.u32 %c, %i, %t;\n@%c bra LOOP;\n"
    body += "vote.sync.ballot.b32 %m, 1, 0xFFFFFFDF;\nst.global.b32 [%q], %n;\n"
    result = launch(body, [out])
    assert not result.findings
    assert out.tolist() == [99 if t == 5 else (t + 1 + 1) // 2 + (t + 1) // 2 * 100 for t in range(32)]


def shared_exchange(barrier):
    """Every thread reads what the one 32 after it wrote."""
    body = ".reg .b32 %s, %x, %m;\n.reg .b64 %q;\nmov.u32 %s, memory;\nmad.lo.u32 %s, %t, 4, %s;\n"
    body += f"st.shared.b32 [%s], %t;\n{barrier}\nadd.u32 %m, %t, 32;\nand.b32 %m, %m, 63;\nmov.u32 %s, memory;\n"
    return body + f"mad.lo.u32 %s, %m, 4, %s;\nld.shared.b32 %x, [%s];\n{MINE}%p0;\nst.global.b32 [%q], %x;\n"


@pytest.mark.parametrize("order", [0, 1, 2])
def test_barriers(order):
    out = np.zeros(64, np.uint32)
    result = launch(shared_exchange("bar.sync 0;"), [out], threads=64, shared=256, warp_order=order)
    assert not result.findings and out.tolist() == [(t + 32) % 64 for t in range(64)]
    faults = {f.fault for f in launch(shared_exchange(""), [out], threads=64, shared=256, warp_order=order).findings}
    assert "race between warps on shared memory" in faults
