"""Shuffles, votes, reductions and matrix products: what the lanes of a warp do together."""

import numpy as np
import pytest
import torch

from .harness import launch

RNG = np.random.default_rng(1)
MINE = "mad.wide.u32 %q, %t, 4, "


def words(count):
    return RNG.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize(("mode", "b", "c", "of"), [
    ("bfly", 5, 31, lambda i: i ^ 5), ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
    ("down", 4, 31, lambda i: i + 4 if i + 4 < 32 else i), ("idx", 7, 31, lambda i: 7),
    ("idx", 2, 0x1C1F, lambda i: i // 4 * 4 + 2), ("up", 1, 0x1800, lambda i: i - 1 if i % 8 else i),
    ("bfly", 16, 0x1F1F, lambda i: i ^ 16 if i >= 16 else i),
])  # fmt: skip
def test_shuffles(mode, b, c, of):
    a, out = words(32), np.zeros(32, np.uint32)
    launch(
        f".reg .b32 %x, %d;\n.reg .b64 %q;\n{MINE}%p0;\nld.global.b32 %x, [%q];\n"
        f"shfl.sync.{mode}.b32 %d, %x, {b}, {c}, -1;\n{MINE}%p1;\nst.global.b32 [%q], %d;", [a, out],
    )  # fmt: skip
    np.testing.assert_array_equal(out, [a[of(i)] for i in range(32)])


def test_votes_and_reductions():
    a, out = RNG.integers(-100, 100, 32).astype(np.int32), np.zeros((5, 32), np.int32)
    body = f".reg .b32 %x, %d<5>;\n.reg .pred %c, %all;\n.reg .b64 %q;\n{MINE}%p0;\nld.global.b32 %x, [%q];\n"
    body += "setp.gt.s32 %c, %x, 0;\nvote.sync.ballot.b32 %d0, %c, -1;\nredux.sync.add.s32 %d1, %x, -1;\n"
    body += "redux.sync.max.s32 %d2, %x, -1;\nredux.sync.min.s32 %d3, %x, -1;\nvote.sync.any.pred %all, %c, -1;\n"
    body += f"selp.b32 %d4, 1, 0, %all;\n{MINE}%p1;\n"
    body += "".join(f"st.global.b32 [%q+{128 * i}], %d{i};\n" for i in range(5))
    launch(body, [a, out])
    ballot = sum(1 << i for i in range(32) if a[i] > 0)
    assert out[0].view(np.uint32).tolist() == [ballot] * 32
    assert out[1:, 0].tolist() == [a.sum(), a.max(), a.min(), 1]


MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 16, 4, 2),
    "m16n8k16.row.col.f32.f16.f16.f32": (torch.float16, 16, 4, 2),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 8, 2, 1),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (torch.float32, 8, 4, 2),
}


@pytest.mark.parametrize("shape", MMA)
def test_matrix_products(shape):
    dtype, depth, a_count, b_count = MMA[shape]
    a = torch.randint(-8, 9, (16, depth)).to(dtype)
    b = torch.randint(-8, 9, (depth, 8)).to(dtype)
    c = torch.randn(16, 8)
    per = 4 // dtype.itemsize  # values of a register
    a_registers, b_registers, c_registers = (np.zeros((32, n), np.uint32) for n in (a_count, b_count, 4))

    def bits(values):
        return int.from_bytes(torch.stack(values).view(torch.uint8).numpy().tobytes(), "little")

    for lane in range(32):
        g, t = lane // 4, lane % 4
        for r in range(a_count):
            a_registers[lane, r] = bits([a[g + 8 * (r % 2), t * per + e + 4 * per * (r // 2)] for e in range(per)])
        for r in range(b_count):
            b_registers[lane, r] = bits([b[t * per + e + 4 * per * r, g] for e in range(per)])
        for r in range(4):
            c_registers[lane, r] = bits([c[g + 8 * (r // 2), 2 * t + r % 2]])
    out = np.zeros((32, 4), np.uint32)
    body = ".reg .b32 %a<4>, %b<2>, %c<4>, %d<4>;\n.reg .b64 %q;\n"
    for i, (name, count) in enumerate((("a", a_count), ("b", b_count), ("c", 4))):
        body += f"mad.wide.u32 %q, %t, {4 * count}, %p{i};\n"
        body += "".join(f"ld.global.b32 %{name}{k}, [%q+{4 * k}];\n" for k in range(count))
    lists = {n: "{" + ", ".join(f"%{n}{k}" for k in range(m)) + "}" for n, m in (("d", 4), ("a", a_count), ("b", b_count), ("c", 4))}
    body += f"mma.sync.aligned.{shape} {lists['d']}, {lists['a']}, {lists['b']}, {lists['c']};\n"
    body += "mad.wide.u32 %q, %t, 16, %p3;\n" + "".join(f"st.global.b32 [%q+{4 * k}], %d{k};\n" for k in range(4))
    assert not launch(body, [a_registers, b_registers, c_registers, out]).findings
    found = torch.zeros(16, 8)
    for lane in range(32):
        for r in range(4):
            found[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2] = float(out[lane, r : r + 1].view(np.float32)[0])
    expected = a.double() @ b.double() + c.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(trans):
    rows, out = RNG.integers(0, 65536, (4, 8, 8)).astype(np.uint16), np.zeros((32, 4), np.uint32)
    body = ".reg .b32 %x<4>, %s, %d<4>;\n.reg .b64 %q;\nmad.wide.u32 %q, %t, 16, %p0;\n"
    body += "ld.global.v4.b32 {%x0, %x1, %x2, %x3}, [%q];\nmov.u32 %s, memory;\nmad.lo.u32 %s, %t, 16, %s;\n"
    body += "st.shared.v4.b32 [%s], {%x0, %x1, %x2, %x3};\nbar.warp.sync -1;\n"
    body += f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if trans else ''}.shared.b16 {{%d0, %d1, %d2, %d3}}, [%s];\n"
    body += "mad.wide.u32 %q, %t, 16, %p1;\nst.global.v4.b32 [%q], {%d0, %d1, %d2, %d3};\n"
    result = launch(body, [rows, out], shared=512)
    assert not result.findings
    for m in range(4):
        matrix = rows[m].T if trans else rows[m]
        np.testing.assert_array_equal(out[:, m].copy().view(np.uint16).reshape(8, 8), matrix)
    stat = next(s for s, i in zip(result.stats, result.program.kernel.instructions, strict=True) if "ldmatrix" in i.opcode)
    assert (stat.wavefronts, stat.ideal_wavefronts) == (4, 4)
