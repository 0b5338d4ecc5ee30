"""What vLLM's Marlin kernel is counted on: its PTX from a wheel, and the experts' tiles."""

from __future__ import annotations

import zipfile

import pytest
import torch

from benchmarks.kernel_report.marlin import SHAPES, kernels, sorted_pairs, with_lines
from testing.ptxrun.parse import parse

PTX = """.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry _Z6Marlin(
.param .u32 count
)
{
.reg .pred %p<2>;
.reg .b32 %r<3>;
.loc 1 7 0
ld.param.u32 %r1, [count];
AGAIN:
add.s32 %r1, %r1, -1;
setp.ne.s32 %p1, %r1, 0;
@%p1 bra AGAIN;
ret;
}
"""


def test_every_instruction_is_a_line_of_its_own():
    (before,), (after,) = parse(PTX).values(), parse(with_lines(PTX)).values()
    assert [i.text for i in after.instructions] == [i.text for i in before.instructions]
    assert {i.source and i.source[0] for i in after.instructions} == {"marlin.ptx"}
    assert len({i.source for i in after.instructions}) == 5


def test_pairs_fill_whole_tiles():
    """Expert 5 has nine pairs, which take two tiles; 18 is no pair's number."""
    ids = torch.tensor([[5, 2]] * 9)
    pairs, experts = sorted_pairs(ids)
    assert experts.tolist() == [2, 2, 5, 5]
    assert pairs.tolist() == [*range(1, 18, 2), *[18] * 7, *range(0, 18, 2), *[18] * 7]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_blocks_shared_memory_holds_four_stages(shape):
    stages = 4 * (shape.rows * shape.columns // 2 + 16 * shape.columns * 2 + shape.rows * 2)
    assert shape.shared == stages + 256


def test_a_wheel_without_the_kernels_is_refused(tmp_path):
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
    with pytest.raises(ValueError, match=r"vllm\.whl: holds no vllm/_moe_C_stable_libtorch.*Pass a CUDA wheel of vLLM"):
        kernels(wheel)
