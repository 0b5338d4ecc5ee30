"""Shuffles, votes, reductions and matrix products: what the lanes of a warp do together."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from testing.ptxrun.snippets import launch

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


LOADED = f".reg .b32 %x, %d;\n.reg .pred %c, %e;\n.reg .b64 %q;\n{MINE}%p0;\nld.global.b32 %x, [%q];\n"
STORED = f"{MINE}%p1;\nst.global.b32 [%q], %d;\n"
REDUCTIONS: dict[str, Callable[[np.ndarray], np.integer]] = {
    "add.s32": lambda a: a.sum(), "max.s32": max, "min.s32": min, "add.u32": lambda a: a.sum(),
    "max.u32": lambda a: a.view(np.uint32).max(), "min.u32": lambda a: a.view(np.uint32).min(),
    "and.b32": np.bitwise_and.reduce, "or.b32": np.bitwise_or.reduce, "xor.b32": np.bitwise_xor.reduce,
}  # fmt: skip


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions(op):
    a, out = RNG.integers(-100, 100, 32).astype(np.int32), np.zeros(32, np.uint32)
    assert not launch(f"{LOADED}redux.sync.{op} %d, %x, -1;\n{STORED}", [a, out]).findings
    assert out.tolist() == [int(REDUCTIONS[op](a)) & 0xFFFFFFFF] * 32


@pytest.mark.parametrize("positive", [0, 5, 32])
def test_votes(positive):
    a, out = np.repeat([1, -1], [positive, 32 - positive]).astype(np.int32), np.zeros(32, np.uint32)
    compared = f"{LOADED}setp.gt.s32 %c, %x, 0;\n"
    launch(f"{compared}vote.sync.ballot.b32 %d, %c, -1;\n{STORED}", [a, out])
    assert out.tolist() == [(1 << positive) - 1] * 32
    for mode, holds in {"any": positive > 0, "all": positive == 32, "uni": positive in (0, 32)}.items():
        launch(f"{compared}vote.sync.{mode}.pred %e, %c, -1;\nselp.b32 %d, 1, 0, %e;\n{STORED}", [a, out])
        assert out.tolist() == [holds] * 32


def test_matches_elections_and_active_lanes():
    a, out = RNG.integers(0, 4, 32).astype(np.uint32), np.zeros(32, np.uint32)
    launch(f"{LOADED}match.any.sync.b32 %d, %x, -1;\n{STORED}", [a, out])
    assert out.tolist() == [sum(1 << j for j in range(32) if a[j] == a[i]) for i in range(32)]
    launch(f"{LOADED}elect.sync %d|%c, -1;\n@%c add.u32 %d, %d, 7;\n{STORED}", [a, out])
    assert out.tolist() == [7] + [0] * 31
    launch(f"{LOADED}setp.lt.u32 %c, %t, 3;\nmov.u32 %d, 0;\n@%c activemask.b32 %d;\n{STORED}", [a, out])
    assert out.tolist() == [7] * 3 + [0] * 29


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
    lists = {
        n: "{" + ", ".join(f"%{n}{k}" for k in range(m)) + "}"
        for n, m in (("d", 4), ("a", a_count), ("b", b_count), ("c", 4))
    }
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
    stat = next(
        s for s, i in zip(result.stats, result.program.kernel.instructions, strict=True) if "ldmatrix" in i.opcode
    )
    assert (stat.wavefronts, stat.ideal_wavefronts) == (4, 4)


@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix(trans):
    fragments, out = words(128).reshape(32, 4), np.zeros((4, 8, 8), np.uint16)
    body = ".reg .b32 %x<4>, %s;\n.reg .b64 %q;\nmad.wide.u32 %q, %t, 16, %p0;\n"
    body += "ld.global.v4.b32 {%x0, %x1, %x2, %x3}, [%q];\nmov.u32 %s, memory;\nmad.lo.u32 %s, %t, 16, %s;\n"
    body += f"stmatrix.sync.aligned.m8n8.x4{'.trans' if trans else ''}.shared.b16 [%s], {{%x0, %x1, %x2, %x3}};\n"
    body += "bar.warp.sync -1;\nld.shared.v4.b32 {%x0, %x1, %x2, %x3}, [%s];\nmad.wide.u32 %q, %t, 16, %p1;\n"
    assert not launch(f"{body}st.global.v4.b32 [%q], {{%x0, %x1, %x2, %x3}};\n", [fragments, out], shared=512).findings
    for m in range(4):
        matrix = fragments[:, m].copy().view(np.uint16).reshape(8, 8)
        np.testing.assert_array_equal(out[m], matrix.T if trans else matrix)


def stored(matrix, span, transposed):
    """A matrix [rows, 16] in wgmma's layout with swizzled rows of `span` bytes; leading and stride offsets / 16."""
    rows, depth = matrix.shape
    memory = np.zeros(rows * span, np.uint8)
    for r in range(rows):
        for k in range(depth):
            outer, inner = (k, r) if transposed else (r, k)  # `inner` runs along a row of `span` bytes
            if transposed:
                at = inner * 2 // span * (depth * span) + outer * span + inner * 2 % span
            else:
                at = outer * span + inner * 2
            at ^= {128: at >> 7 & 7, 64: at >> 7 & 3, 32: at >> 7 & 1}[span] << 4
            memory[at : at + 2] = np.frombuffer(matrix[r, k].tobytes(), np.uint8)
    leading = depth * span if transposed else 16
    return memory, leading >> 4, 8 * span >> 4


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("registers", [False, True])
def test_products_of_four_warps(span, transposed, registers):
    """wgmma m64n64k16: A in registers or shared memory, B in either order, added to what the result held."""
    a, b = RNG.integers(-8, 9, (64, 16)), RNG.integers(-8, 9, (64, 16))
    halves = a.astype(np.float16), b.astype(np.float16)
    (a_memory, a_leading, a_stride), (b_memory, b_leading, b_stride) = (
        stored(halves[0], span, False), stored(halves[1], span, transposed),
    )  # fmt: skip
    mode = {32: 3, 64: 2, 128: 1}[span]
    a_at, b_at = 0, 8192
    shared = np.zeros(16384, np.uint8)
    shared[a_at : a_at + len(a_memory)], shared[b_at : b_at + len(b_memory)] = a_memory, b_memory
    descriptors = [
        at >> 4 | leading << 16 | stride << 32 | mode << 62
        for at, leading, stride in ((a_at, a_leading, a_stride), (b_at, b_leading, b_stride))
    ]
    fragments = np.zeros((128, 4, 2), np.float16)
    for t in range(128):
        for r in range(4):
            row, column = t // 32 * 16 + t % 32 // 4 + r % 2 * 8, r // 2 * 8 + t % 4 * 2
            fragments[t, r] = halves[0][row, column : column + 2]
    out = np.zeros((128, 32), np.float32)
    d = "{" + ", ".join(f"%d{i}" for i in range(32)) + "}"
    body = ".reg .b32 %d<32>, %x<4>, %a<4>, %s;\n.reg .b64 %q, %m, %n;\n.reg .pred %add;\nmov.u32 %s, memory;\n"
    body += "mad.lo.u32 %s, %t, 128, %s;\nmad.wide.u32 %q, %t, 128, %p0;\n"
    for i in range(8):
        body += f"ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%q+{16 * i}];\n"
        body += f"st.shared.v4.b32 [%s+{16 * i}], {{%x0, %x1, %x2, %x3}};\n"
    body += "mad.wide.u32 %q, %t, 16, %p1;\nld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%q];\nbar.sync 0;\n"
    body += "".join(f"mov.b32 %d{i}, 0f3F000000;\n" for i in range(32)) + "setp.eq.u32 %add, %t, %t;\n"
    body += f"mov.b64 %m, {descriptors[0]};\nmov.b64 %n, {descriptors[1]};\nwgmma.fence.sync.aligned;\n"
    product = "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16"
    if registers:
        body += f"{product} {d}, {{%a0, %a1, %a2, %a3}}, %n, %add, 1, 1, {int(transposed)};\n"
    else:
        body += f"{product} {d}, %m, %n, %add, 1, 1, 0, {int(transposed)};\n"
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\nmad.wide.u32 %q, %t, 128, %p2;\n"
    body += "".join(f"st.global.b32 [%q+{4 * i}], %d{i};\n" for i in range(32))
    assert not launch(body, [shared, fragments, out], threads=128, shared=16384).findings
    found = np.zeros((64, 64))
    for t in range(128):
        for i in range(32):
            found[t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2] = out[t, i]
    np.testing.assert_array_equal(found, a @ b.T + 0.5)
