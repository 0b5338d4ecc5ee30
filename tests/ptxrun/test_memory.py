"""Asynchronous copies, atomics, local memory, and what is counted of memory accesses."""

import numpy as np
import pytest

from testing.ptxrun.executable import Fault

from .harness import faults, launch

RNG = np.random.default_rng(1)
MINE = "mad.wide.u32 %q, %t, 4, "


def words(count):
    return RNG.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)


COPY = "mov.u32 %s, memory;\nmad.lo.u32 %s, %t, 16, %s;\nmad.wide.u32 %q, %t, 16, %p0;\ncp.async.cg.shared.global [%s], [%q], 16, 16;\n"


@pytest.mark.parametrize("waits", [True, False])
def test_asynchronous_copies_land_at_the_wait(waits):
    a, out = words(128), np.zeros(128, np.uint32)
    body = ".reg .b32 %s, %x<4>;\n.reg .b64 %q;\n" + COPY + "cp.async.commit_group;\n"
    body += f"cp.async.wait_group {0 if waits else 1};\n"
    body += "ld.shared.v4.b32 {%x0, %x1, %x2, %x3}, [%s];\nmad.wide.u32 %q, %t, 16, %p1;\n"
    body += "st.global.v4.b32 [%q], {%x0, %x1, %x2, %x3};\n"
    faults = {f.fault for f in launch(body, [a, out], shared=512).findings}
    assert (not faults) == waits
    assert (a == out).all() == waits
    if not waits:
        assert faults == {"read of a copy before its wait", "copy that is never waited for"}


def test_copies_fill_with_zeros():
    a, out = words(128), np.full(128, 7, np.uint32)
    body = ".reg .b32 %s, %x<4>;\n.reg .b64 %q;\n" + COPY.replace("16, 16;", "16, 0;") + "cp.async.wait_all;\n"
    body += "ld.shared.v4.b32 {%x0, %x1, %x2, %x3}, [%s];\nmad.wide.u32 %q, %t, 16, %p1;\n"
    body += "st.global.v4.b32 [%q], {%x0, %x1, %x2, %x3};\n"
    assert not launch(body, [a, out], shared=512).findings
    assert not out.any()


def test_atomics():
    out = np.zeros(4, np.uint32)
    body = ".reg .b32 %o;\natom.global.add.u32 %o, [%p0], 2;\natom.global.gpu.relaxed.max.u32 %o, [%p0+4], %t;\n"
    body += "red.global.add.f32 [%p0+8], 0f3F800000;\natom.global.cas.b32 %o, [%p0+12], 0, 9;\n"
    launch(body, [out], threads=64, grid=3)
    assert out.tolist()[:2] == [384, 63] and out[2:3].view(np.float32)[0] == 192.0 and out[3] == 9


@pytest.mark.parametrize(("stride", "sectors", "wavefronts"), [(4, 4, 1), (8, 8, 2), (128, 32, 32), (0, 1, 1)])
def test_counters(stride, sectors, wavefronts):
    raw = np.zeros(1 << 14, np.uint8)
    at = -raw.ctypes.data % 128
    a = raw[at : at + (1 << 13)]
    body = f".reg .b32 %x, %s;\n.reg .b64 %q;\nmad.wide.u32 %q, %t, {stride}, %p0;\nld.global.b32 %x, [%q];\n"
    body += f"mov.u32 %s, memory;\nmad.lo.u32 %s, %t, {stride}, %s;\nld.shared.b32 %x, [%s];"
    result = launch(body, [a], shared=8192)
    by = {i.opcode: s for s, i in zip(result.stats, result.program.kernel.instructions, strict=True)}
    assert by["ld.global.b32"].sectors == sectors
    assert by["ld.shared.b32"].wavefronts == wavefronts
