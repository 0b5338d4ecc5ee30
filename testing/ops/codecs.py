"""How a cached row is stored, from the bit definitions of e4m3, e2m1, ue8m0 and bf16, in Python floats.

The oracle of `ops/rows.py`: it takes a `RowFormat` as a description and uses none of the package's arithmetic.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

import torch

from vllm_deepseek_v4flash.ops.rows import RowFormat


def e4m3(code: int) -> float:
    """Sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinity, NaN where all but the sign are ones."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(code: int) -> float:
    """Sign, 2 exponent bits of bias 1, 1 mantissa bit; no infinity, no NaN."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def ue8m0(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


E4M3_MAGNITUDES = [e4m3(code) for code in range(127)]
E2M1_MAGNITUDES = [e2m1(code) for code in range(8)]


def nearest(value: float, magnitudes: Sequence[float]) -> int:
    """The code in 0..len-1 of the nearest magnitude, ties to the even code, saturating; the sign is left out."""
    value = abs(value)
    above = bisect_left(magnitudes, value)
    if above == len(magnitudes):
        return above - 1
    if above == 0:
        return 0
    down, up = value - magnitudes[above - 1], magnitudes[above] - value
    return above - 1 if down < up or (down == up and above % 2) else above


def scale_byte(amax: float, largest: float, floor: float) -> int:
    """The ue8m0 byte of 2^ceil(log2(max(amax, floor) / largest)), in exact arithmetic."""
    quotient = Fraction(max(amax, floor)) / Fraction(largest)
    exponent = math.frexp(max(amax, floor) / largest)[1]
    while Fraction(2) ** exponent >= quotient:
        exponent -= 1
    return exponent + 1 + 127


def bf16_bytes(value: float) -> bytes:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.pack("<H", bits + 0x7FFF + (bits >> 16 & 1) >> 16)


def bf16_value(pair: bytes) -> float:
    return struct.unpack("<f", b"\0\0" + bytes(pair))[0]


def sylvester(values: Sequence[float]) -> list[float]:
    """The orthonormal Hadamard transform by its definition: entry (i, j) is (-1)^(ones in i & j)."""
    dim = len(values)
    return [sum(-v if (i & j).bit_count() % 2 else v for j, v in enumerate(values)) * dim**-0.5 for i in range(dim)]


def _encode_blocks(
    values: Sequence[float], block: int, largest: float, floor: float, magnitudes: Sequence[float], sign_bit: int
) -> tuple[list[int], list[int]]:
    codes: list[int] = []
    scales: list[int] = []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scale = scale_byte(max(abs(v) for v in part), largest, floor)
        scales.append(scale)
        for v in part:
            code = nearest(v / ue8m0(scale), magnitudes)
            codes.append(code | (sign_bit if math.copysign(1, v) < 0 else 0))
    return codes, scales


def encode(values: Sequence[float], fmt: RowFormat) -> tuple[bytes, bytes]:
    """One row of floats to its data and scale bytes."""
    if fmt.codec == "plain":
        return torch.tensor(values, dtype=torch.float64).to(fmt.dtype).view(torch.uint8).numpy().tobytes(), b""
    if fmt.codec == "e2m1":
        codes, scales = _encode_blocks(sylvester(values), 32, 6.0, 6 * 2.0**-126, E2M1_MAGNITUDES, 8)
        return bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)), bytes(scales)
    codes, scales = _encode_blocks(values[: fmt.quantised], 64, 448.0, 1e-4, E4M3_MAGNITUDES, 0x80)
    tail = b"".join(bf16_bytes(v) for v in values[fmt.quantised :])
    return bytes(codes) + tail, bytes(scales)


def decode(data: bytes, scales: bytes, fmt: RowFormat) -> list[float]:
    """Data and scale bytes to one row of floats; 4-bit rows stay transformed."""
    if fmt.codec == "plain":
        return torch.frombuffer(bytearray(data), dtype=fmt.dtype).double().tolist()
    if fmt.codec == "e2m1":
        codes = [nibble for byte in data for nibble in (byte & 15, byte >> 4)]
        return [e2m1(code) * ue8m0(scales[i // 32]) for i, code in enumerate(codes)]
    head = [e4m3(code) * ue8m0(scales[i // 64]) for i, code in enumerate(data[: fmt.quantised])]
    tail = data[fmt.quantised :]
    return head + [bf16_value(tail[i : i + 2]) for i in range(0, len(tail), 2)]


def data_bytes(fmt: RowFormat) -> int:
    if fmt.codec == "plain":
        return fmt.dim * fmt.dtype.itemsize
    if fmt.codec == "e2m1":
        return fmt.dim // 2
    return fmt.quantised + 2 * (fmt.dim - fmt.quantised)


def scale_bytes(fmt: RowFormat) -> int:
    return {"plain": 0, "e2m1": fmt.dim // 32, "e4m3": math.ceil(fmt.quantised / 64)}[fmt.codec]
