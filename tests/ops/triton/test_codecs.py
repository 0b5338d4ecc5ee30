"""8- and 4-bit numbers in kernels against their bit definitions (docs/model.md, "Weight encodings")."""

import math
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl

from testing.ops import codecs
from vllm_deepseek_v4flash.ops.triton.codecs import (
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    power_of_two,
    scale_byte,
)

BLOCK = 4096


@triton.jit
def _apply(x, out, count, WHAT: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n, mask=n < count, other=0)
    if WHAT == "decode_e4m3":
        result = decode_e4m3(value, NATIVE)
    elif WHAT == "encode_e4m3":
        result = encode_e4m3(value, NATIVE)
    elif WHAT == "decode_e2m1":
        result = decode_e2m1(value)
    elif WHAT == "encode_e2m1":
        result = encode_e2m1(value)
    elif WHAT == "power_of_two":
        result = power_of_two(value)
    elif WHAT == "scale_byte_fp8":
        result = scale_byte(value, 1e-4, 448.0)
    else:
        result = scale_byte(value, 6.0 * 2.0**-126, 6.0)
    tl.store(out + n, result, mask=n < count)


def apply(what, x, dtype, native=False):
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _apply[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), WHAT=what, NATIVE=native, BLOCK=BLOCK)
    return out.cpu()


def all_bf16(largest):
    """Every finite bf16 value of magnitude at most `largest`, as fp32."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return values[values.abs() <= largest]


def around(values):
    """fp32 numbers and both neighbours of each, of either sign."""
    x = torch.tensor(values, dtype=torch.float32)
    near = torch.cat((x, torch.nextafter(x, torch.tensor(torch.inf)), torch.nextafter(x, torch.tensor(0.0))))
    return torch.cat((near, -near))


def halfway(magnitudes):
    return [(a + b) / 2 for a, b in pairwise(magnitudes)]


def same_bits(actual, expected):
    assert torch.equal(actual.view(torch.int32), torch.tensor(expected, dtype=torch.float32).view(torch.int32))


def encoded(x, magnitudes, sign_bit):
    signs = (sign_bit if math.copysign(1, v) < 0 else 0 for v in x.tolist())
    return [codecs.nearest(v, magnitudes) | sign for v, sign in zip(x.tolist(), signs, strict=True)]


def test_e4m3_decodes_every_finite_code(device, native):
    finite = [code for code in range(256) if code & 127 != 127]
    assert len(finite) == 254
    codes = torch.tensor(finite, dtype=torch.uint8, device=device)
    same_bits(apply("decode_e4m3", codes, torch.float32, native), [codecs.e4m3(code) for code in finite])


def test_e4m3_encodes_to_the_nearest_code(device, native):
    ties = around([*halfway(codecs.E4M3_MAGNITUDES), *codecs.E4M3_MAGNITUDES])
    # fp32's own smallest numbers and those that round to the smallest code.
    tiny = around([2.0**-149, 2.0**-126, 1e-20, 2.0**-10, 2.0**-9, 2.0**-7])
    x = torch.cat((all_bf16(448.0), ties, tiny))
    x = x[x.abs() <= 448]
    actual = apply("encode_e4m3", x.to(device), torch.uint8, native)
    assert actual.tolist() == encoded(x, codecs.E4M3_MAGNITUDES, 0x80)


def test_e2m1_decodes_every_code(device):
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    same_bits(apply("decode_e2m1", codes, torch.float32), [codecs.e2m1(code) for code in range(16)])


def test_e2m1_encodes_to_the_nearest_code(device):
    x = torch.cat((all_bf16(6.0), around([*halfway(codecs.E2M1_MAGNITUDES), *codecs.E2M1_MAGNITUDES])))
    x = x[(x.abs() <= 6) & (x != 0)]
    actual = apply("encode_e2m1", x.to(device), torch.uint8)
    assert actual.tolist() == encoded(x, codecs.E2M1_MAGNITUDES, 8)


def test_ue8m0_is_a_power_of_two(device):
    numbers = torch.arange(1, 255, dtype=torch.uint8, device=device)
    same_bits(apply("power_of_two", numbers, torch.float32), [codecs.ue8m0(byte) for byte in range(1, 255)])


@pytest.mark.parametrize(("rows", "largest", "floor"), [("fp8", 448.0, 1e-4), ("fp4", 6.0, 6 * 2.0**-126)])
def test_scales_are_the_next_power_of_two(device, rows, largest, floor):
    amax = all_bf16(3.4e38)
    amax = torch.cat((amax[amax >= 0], torch.tensor([floor, floor / 2])))
    expected = [codecs.scale_byte(v, largest, torch.tensor(floor).item()) for v in amax.tolist()]
    assert apply(f"scale_byte_{rows}", amax.to(device), torch.uint8).tolist() == expected
