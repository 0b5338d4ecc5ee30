"""8- and 4-bit numbers inside kernels: e4m3, e2m1 and their power-of-two scales (docs/model.md, "Weight encodings").

SM80 has no instruction that converts e4m3. `NATIVE` chooses between the instruction and bit arithmetic that gives the
same results: decoding is exact for all 254 finite codes, encoding rounds to the nearest code, ties to the even one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_e4m3(code, NATIVE: tl.constexpr):
    """uint8 codes to fp32."""
    if NATIVE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = code.to(tl.uint32)
        # Exponent and mantissa in their places of an fp32 make 2^-120 of the value, subnormal codes included.
        value = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return value


@triton.jit
def encode_e4m3(x, NATIVE: tl.constexpr):
    """fp32 of magnitude at most 448 to uint8 codes."""
    if NATIVE:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Half of the lowest kept bit, less one where that bit is even, carries as rounding demands; 120 rebiases.
        normal = (magnitude + 0x7FFFF + (magnitude >> 20 & 1) >> 20) - (120 << 3)
        # Below 2^-6 codes are multiples of 2^-9, the last bit of fp32 numbers from 2^14 on: the addition rounds.
        subnormal = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = (tl.where(magnitude < 0x3C800000, subnormal, normal) | bits >> 24 & 0x80).to(tl.uint8)
    return code


@triton.jit
def decode_e2m1(code):
    """Codes 0..15 of any integer type to fp32."""
    bits = code.to(tl.uint32)
    # As for e4m3: one mantissa bit, exponent bias 1, so 2^126 restores the value.
    value = ((bits & 8) << 28 | (bits & 7) << 22).to(tl.float32, bitcast=True)
    return value * 8.507059173023462e37  # 2^126


@triton.jit
def encode_e2m1(x):
    """fp32 of magnitude at most 6 to uint8 codes 0..15."""
    a = tl.abs(x)
    # Halfway points between codes; >= where the upper code is even.
    code = (a > 0.25).to(tl.uint8) + (a >= 0.75).to(tl.uint8) + (a > 1.25).to(tl.uint8) + (a >= 1.75).to(tl.uint8)
    code += (a > 2.5).to(tl.uint8) + (a >= 3.5).to(tl.uint8) + (a > 5.0).to(tl.uint8)
    return code | ((x < 0).to(tl.uint8) << 3)


@triton.jit
def power_of_two(ue8m0):
    """Bytes e to 2^(e - 127) in fp32, for e in 1..254; 255 to infinity."""
    return (ue8m0.to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_byte(amax, FLOOR: tl.constexpr, LARGEST: tl.constexpr):
    """The ue8m0 byte (uint8) of 2^ceil(log2(max(amax, FLOOR) / LARGEST)); 255 for infinity."""
    bits = (tl.maximum(amax, FLOOR) * (1.0 / LARGEST)).to(tl.uint32, bitcast=True)
    return (bits + 0x7FFFFF >> 23).to(tl.uint8)


@triton.jit
def magnitude(x):
    """|x| as `scale_byte` takes its largest: infinity for NaN, which a maximum would ignore."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def divided(x, byte, LARGEST: tl.constexpr):
    """x / 2^(byte - 127), clamped to LARGEST; zeros in a block whose scale byte is 255 (`ops/rows.py`)."""
    scaled = x * power_of_two(254 - byte.to(tl.int32))
    return tl.where(byte == 255, 0.0, tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST))
