"""PTX text as compilers lay it out."""

import pytest

from testing.ptxrun.encode import encode
from testing.ptxrun.layout import UnsupportedError
from testing.ptxrun.parse import Address, Immediate, Pair, Register, Sink, Symbol, Vector, parse

MODULE = """
.version 8.7
.target sm_80
.address_size 64
.global .align 4 .b8 table[8] = {1, 0, 0, 0, 255, 255, 255, 255};
.visible .entry named(
    .param .u64 .ptr .global .align 1 first, // a comment
    .param .u8 small,
    .param .align 8 .b8 structure[24]
) .reqntid 128
{
    .reg .pred %p<3>; /* spans
    lines */
    .reg .b32 %r<2>;
    .shared .align 16 .b8 tile[64];
    .loc 1 42 7
    @!%p1 ld.global.v2.b32 {%r0, _}, [%r1+-8];
    {
        .reg .b32 %r0;
        shfl.sync.idx.b32 %r0|%p2, %r1, 0f3F800000, tile+4, -1;
    }
AGAIN:
    bra AGAIN;
    .file 1 "kernels.py"
}
"""


def test_a_module():
    (kernel,) = parse(MODULE).values()
    assert kernel.name == "named"
    assert kernel.parameter_offsets() == {"first": 0, "small": 8, "structure": 16}
    assert [(a.name, a.space, a.size, a.initial) for a in kernel.arrays] == [
        ("tile", "shared", 64, b""), ("table", "global", 8, b"\1\0\0\0\xff\xff\xff\xff"),
    ]  # fmt: skip
    assert kernel.labels == {"AGAIN": 2}
    load, shuffle, branch = kernel.instructions
    assert load.guard == Register("%p1", negated=True)
    assert load.operands == [Vector((Register("%r0"), Sink())), Address(Register("%r1"), -8)]
    assert (load.line, load.source) == (17, ("kernels.py", 42))
    assert shuffle.operands[0] == Pair(Register("scope1.%r0"), Register("%p2"))
    assert shuffle.operands[2:] == [Immediate("0f3F800000"), Symbol("tile", 4), Immediate("-1")]
    assert branch.operands == [Symbol("AGAIN")]


@pytest.mark.parametrize(
    ("text", "type_", "bits"),
    [
        ("-1", "u32", 0xFFFFFFFF), ("0x10", "b64", 16), ("7U", "u16", 7), ("0f3F800000", "f32", 0x3F800000),
        ("0f3F800000", "f64", 0x3FF0000000000000), ("0d4000000000000000", "f64", 0x4000000000000000),
        ("1.5", "f32", 0x3FC00000), ("-.5", "f16", 0xB800),
    ],
)  # fmt: skip
def test_constants(text, type_, bits):
    assert Immediate(text).bits(type_) == bits


def test_what_is_not_supported_is_named():
    body = "tex.2d.v4.f32.f32 {%a, %a, %a, %a}, [%a];\nmov.u32 %a, %clusterid.x;\ncp.async.bulk.commit_group;\nret;"
    (kernel,) = parse(f".visible .entry k()\n{{\n.reg .b32 %a;\n{body}\n}}\n").values()
    with pytest.raises(UnsupportedError, match=r"%clusterid\.x.*bulk copies"):
        encode(kernel, (32, 1, 1))
    with pytest.raises(ValueError, match=r"PTX line 4: unknown directive '\.surprise 3'"):
        parse(".visible .entry k()\n{\n.reg .b32 %a;\n.surprise 3;\n}\n")
