"""Asynchronous copies, atomics, local memory, and what is counted of memory accesses."""

import numpy as np
import pytest

from testing.ptxrun.executable import Fault
from testing.ptxrun.snippets import faults, launch

RNG = np.random.default_rng(1)
MINE = "mad.wide.u32 %q, %t, 4, "


def words(count):
    return RNG.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)


COPY = (
    "mov.u32 %s, memory;\nmad.lo.u32 %s, %t, 16, %s;\nmad.wide.u32 %q, %t, 16, %p0;\n"
    "cp.async.cg.shared.global [%s], [%q], 16, 16;\n"
)


@pytest.mark.parametrize("waits", [True, False])
def test_asynchronous_copies_land_at_the_wait(waits):
    a, out = words(128), np.zeros(128, np.uint32)
    body = ".reg .b32 %s, %x<4>;\n.reg .b64 %q;\n" + COPY + "cp.async.commit_group;\n"
    body += f"cp.async.wait_group {0 if waits else 1};\n"
    body += "ld.shared.v4.b32 {%x0, %x1, %x2, %x3}, [%s];\nmad.wide.u32 %q, %t, 16, %p1;\n"
    body += "st.global.v4.b32 [%q], {%x0, %x1, %x2, %x3};\n"
    found = faults(launch(body, [a, out], shared=512))
    assert found == (set() if waits else {Fault.PENDING_COPY_READ, Fault.UNWAITED_COPY})
    assert (a == out).all() == waits


def test_copies_fill_with_zeros():
    a, out = words(128), np.full(128, 7, np.uint32)
    body = ".reg .b32 %s, %x<4>;\n.reg .b64 %q;\n" + COPY.replace("16, 16;", "16, 0;") + "cp.async.wait_all;\n"
    body += "ld.shared.v4.b32 {%x0, %x1, %x2, %x3}, [%s];\nmad.wide.u32 %q, %t, 16, %p1;\n"
    body += "st.global.v4.b32 [%q], {%x0, %x1, %x2, %x3};\n"
    assert not launch(body, [a, out], shared=512).findings
    assert not out.any()


ATOMICS = {
    "add.u32": (lambda x: x.sum(), 7), "min.s32": (lambda x: x.min(), 2**31 - 1), "max.u32": (lambda x: x.max(), 0),
    "and.b32": (np.bitwise_and.reduce, 2**32 - 1), "or.b32": (np.bitwise_or.reduce, 0),
    "xor.b32": (np.bitwise_xor.reduce, 0),
}  # fmt: skip


@pytest.mark.parametrize("op", ATOMICS)
def test_atomics(op):
    of, start = ATOMICS[op]
    a = words(64)
    values = np.append(a, np.uint32(start)).view(np.int32 if ".s" in op else np.uint32)
    for opcode, destination in ((f"atom.global.gpu.relaxed.{op}", "%o, "), (f"red.global.{op}", "")):
        out = np.full(1, start, np.uint32)
        body = f".reg .b32 %o, %x;\n.reg .b64 %q;\n{MINE}%p0;\nld.global.b32 %x, [%q];\n"
        assert not launch(f"{body}{opcode} {destination}[%p1], %x;", [a, out], threads=64).findings
        assert out[0] == of(values).astype(np.uint32)


def test_atomics_return_the_old_value():
    out = np.zeros(32, np.uint32)
    body = f".reg .b32 %o;\n.reg .b64 %q;\natom.global.add.u32 %o, [%p0], 1;\n{MINE}%p1;\nst.global.b32 [%q], %o;\n"
    launch(body, [np.array([5], np.uint32), out])
    assert sorted(out.tolist()) == list(range(5, 37))
    out = np.zeros(3, np.uint32)
    body = ".reg .b32 %o;\nred.global.add.f32 [%p0], 0f3F800000;\natom.global.cas.b32 %o, [%p0+4], 0, 9;\n"
    launch(f"{body}atom.global.exch.b32 %o, [%p0+8], 3;\n", [out], threads=64, grid=3)
    assert out[:1].view(np.float32)[0] == 192.0
    assert out[1:].tolist() == [9, 3]


def test_local_memory_belongs_to_a_lane():
    out = np.zeros(64, np.uint32)
    body = ".local .align 8 .b8 depot[16];\n.reg .b32 %x;\n.reg .b64 %q, %l;\nmov.u64 %l, depot;\n"
    body += "cvta.local.u64 %l, %l;\nst.b32 [%l+8], %t;\ncvta.to.local.u64 %l, %l;\nld.local.b32 %x, [%l+8];\n"
    assert not launch(f"{body}{MINE}%p0;\nst.global.b32 [%q], %x;\n", [out], threads=64).findings
    assert out.tolist() == list(range(64))


@pytest.mark.parametrize(("type_", "value"), [("s8", -2), ("u8", 0xFE), ("s16", -2), ("u16", 0xFFFE)])
def test_loads_extend_to_wider_registers(type_, value):
    out = np.zeros(1, np.int32)
    body = f".reg .b32 %x;\nld.global.{type_} %x, [%p0];\nst.global.b32 [%p1], %x;"
    launch(body, [np.array([-2], np.int16), out])
    assert out[0] == value


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
