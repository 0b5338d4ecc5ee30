"""Divergence, barriers, the order of warps and blocks, and the analyses that these rest on."""

import numpy as np
import pytest

from testing.ptxrun import flow
from testing.ptxrun.executable import Schedule, WarpOrder
from testing.ptxrun.parse import parse
from testing.ptxrun.snippets import HEAD, launch

MINE = "mad.wide.u32 %q, %t, 4, "


def test_lanes_diverge_and_meet():
    """Every lane loops a number of times of its own, and one leaves early."""
    out = np.full(32, 99, np.uint32)
    body = ".reg .b32 %n, %i, %m;\n.reg .pred %c, %e;\n.reg .b64 %q;\n" + f"{MINE}%p0;\n"
    body += "mov.u32 %n, 0;\nmov.u32 %i, 0;\nsetp.eq.u32 %e, %t, 5;\n@%e ret;\nLOOP:\n"
    body += "and.b32 %m, %i, 1;\nsetp.eq.u32 %c, %m, 0;\n@%c bra EVEN;\nadd.u32 %n, %n, 100;\nbra NEXT;\nEVEN:\n"
    body += "add.u32 %n, %n, 1;\nNEXT:\nadd.u32 %i, %i, 1;\nsetp.le.u32 %c, %i, %t;\n@%c bra LOOP;\n"
    body += "vote.sync.ballot.b32 %m, 1, 0xFFFFFFDF;\nst.global.b32 [%q], %n;\n"
    result = launch(body, [out])
    assert not result.findings
    assert out.tolist() == [99 if t == 5 else (t + 1 + 1) // 2 + (t + 1) // 2 * 100 for t in range(32)]


@pytest.mark.parametrize("order", WarpOrder)
def test_barriers(order):
    """Every thread reads what the one 32 after it wrote."""
    out = np.zeros(64, np.uint32)
    body = ".reg .b32 %s, %x;\n.reg .b64 %q;\nmov.u32 %s, memory;\nmad.lo.u32 %s, %t, 4, %s;\n"
    body += "st.shared.b32 [%s], %t;\nbar.sync 0;\nxor.b32 %s, %s, 128;\nld.shared.b32 %x, [%s];\n"
    body += f"{MINE}%p0;\nst.global.b32 [%q], %x;\n"
    result = launch(body, [out], threads=64, shared=256, schedule=Schedule(order))
    assert not result.findings
    assert out.tolist() == [(t + 32) % 64 for t in range(64)]


TAKE_A_NUMBER = (
    ".reg .b32 %x, %w, %b;\n.reg .b64 %q;\n.reg .pred %c;\nand.b32 %x, %t, 31;\nsetp.ne.u32 %c, %x, 0;\n@%c ret;\n"
    "atom.global.add.u32 %x, [%p0], 1;\nshr.u32 %w, %t, 5;\nmov.u32 %b, %ctaid.x;\nmad.lo.u32 %w, %b, 2, %w;\n"
    "mad.wide.u32 %q, %w, 4, %p0;\nst.global.b32 [%q+4], %x;\n"
)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [0, 1, 2, 3, 4, 5]),
        (Schedule(WarpOrder.BACKWARD), [1, 0, 3, 2, 5, 4]),
        (Schedule(blocks_backward=True), [4, 5, 2, 3, 0, 1]),
        (Schedule(block_step=2), [0, 1, 99, 99, 2, 3]),
        (Schedule(blocks_backward=True, block_step=2), [2, 3, 99, 99, 0, 1]),
    ],
)
def test_order_of_warps_and_blocks(schedule, expected):
    """Each warp of three blocks takes a number in the order in which they run."""
    out = np.array([0] + [99] * 6, np.uint32)
    result = launch(TAKE_A_NUMBER, [out], threads=64, grid=3, schedule=schedule)
    assert out[1:].tolist() == expected
    assert (result.blocks, result.warps) == (2 if schedule.block_step == 2 else 3, 2)


def kernel(body):
    text = f"{HEAD}.visible .entry k(.param .u32 n)\n{{\n.reg .b32 %a, %b, %c;\n.reg .pred %p;\n{body}\nret;\n}}\n"
    return parse(text)["k"]


def test_lanes_meet_at_the_nearest_common_block():
    made = kernel(
        "setp.eq.u32 %p, %a, 0;\n@%p bra LEFT;\nadd.u32 %b, %a, 1;\nbra JOIN;\nLEFT:\nadd.u32 %b, %a, 2;\n"
        "JOIN:\nadd.u32 %c, %b, 1;\n@%p bra JOIN;"
    )
    blocks = flow.blocks(made)
    assert [(block.first, block.end) for block in blocks] == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 8)]
    assert [block.successors for block in blocks] == [[2, 1], [3], [3], [3, 4], []]
    assert flow.reconvergence(blocks) == [3, 3, 3, 4, None]


def test_registers_share_slots_unless_both_are_live():
    made = kernel("mov.u32 %a, 1;\nadd.u32 %b, %a, 2;\nadd.u32 %c, %b, 3;\nadd.u32 %b, %c, %c;")
    offsets, size = flow.slots(made, flow.blocks(made), dict.fromkeys(made.registers, 128))
    assert offsets["%a"] != offsets["%b"] != offsets["%c"]
    assert offsets["%a"] == offsets["%c"]
    assert size == 256


def test_a_guarded_instruction_keeps_the_lanes_that_it_leaves_out():
    made = kernel("mov.u32 %a, 1;\n@%p mov.u32 %a, 2;")
    assert flow.reads_and_writes(made.instructions[0]) == ([], ["%a"])
    assert flow.reads_and_writes(made.instructions[1]) == (["%p", "%a"], ["%a"])
