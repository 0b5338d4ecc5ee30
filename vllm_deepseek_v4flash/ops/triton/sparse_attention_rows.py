"""Rows of a paged cache in two steps, so that a tile travels while the one before it is multiplied.

`fetch` starts the loads and `decode` takes what has arrived. The layout of a row is `ops/rows.py`'s. What travels is
whole words: bytes and halves of words would take a register each, and be copied from round to round of a loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import PagedRows
from .codecs import power_of_two


def check_words(cache: PagedRows) -> None:
    """Raise ValueError for rows whose parts do not lie at multiples of the words that `fetch` reads."""
    fmt, size = cache.format, cache.format.dtype.itemsize
    if fmt.codec == "e2m1":
        raise ValueError("attention rows have no 4-bit format: use fp8 or plain rows")
    word = 8 if fmt.codec == "e4m3" else 4
    codes, row, page, start = (
        size * n for n in (fmt.quantised, fmt.data_size, cache.pages.stride(0), cache.pages.storage_offset())
    )
    if any(part % word for part in (codes, row, page, start)):
        raise ValueError(
            f"Triton kernels need {fmt.codec} rows whose parts lie at multiples of {word} bytes, got {codes} bytes of "
            f"codes in rows of {row}, and pages {page} bytes apart from {start} on: "
            f"set VLLM_DEEPSEEK_V4FLASH_OPS=reference, or fp32 rows with --kv-cache-dtype float32"
        )


@triton.jit
def fetch(
    data, scales, valid,
    CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr, SCALES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What is stored at the addresses of N rows' data and scales: `stored`, `scale`, `tail`.

    Of e4m3 rows int32 words [N, BLOCK_D // 64, 16] of four codes, scales [N, BLOCK_D // 64], and int64 words of four
    bf16 values where the row has these instead of codes. Of 16-bit rows int32 words [N, BLOCK_D // 2], of fp32 rows
    values [N, BLOCK_D]. Memory is not read where `valid` [N] is False.
    """
    scale, tail = tl.zeros((1,), tl.uint8), tl.zeros((1,), tl.int64)
    if CODEC == "e4m3":
        g = tl.arange(0, BLOCK_D // 64)[None, :]
        scale = tl.load(scales[:, None] + g, mask=valid[:, None] & (g < SCALES), other=127)
        w = g[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        words = data.to(tl.pointer_type(tl.int32))[:, None, None] + w
        stored = tl.load(words, mask=valid[:, None, None] & (w < QUANTISED // 4), other=0)
        if QUANTISED < DIM:
            words = (data + QUANTISED).to(tl.pointer_type(tl.int64))[:, None, None] + (w - QUANTISED // 4)
            in_tail = (w >= QUANTISED // 4) & (w < DIM // 4)
            tail = tl.load(words, mask=valid[:, None, None] & in_tail, other=0)
    elif data.dtype.element_ty.primitive_bitwidth == 16:
        w = tl.arange(0, BLOCK_D // 2)[None, :]
        words = data.to(tl.pointer_type(tl.int32))[:, None] + w
        stored = tl.load(words, mask=valid[:, None] & (w < DIM // 2), other=0)
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        stored = tl.load(data[:, None] + d, mask=valid[:, None] & (d < DIM), other=0.0)
    return stored, scale, tail


@triton.jit
def decode(
    stored, scale, tail, N: tl.constexpr, CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr,
    BLOCK_D: tl.constexpr, NATIVE: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The even and the odd values of fetched rows, [N, BLOCK_D // 2] of DTYPE; 0 where nothing was read."""
    HALF: tl.constexpr = BLOCK_D // 2
    if CODEC == "e4m3":
        scale = power_of_two(scale)[:, :, None]
        a, b = _code(stored, 0, NATIVE) * scale, _code(stored, 1, NATIVE) * scale
        c, d = _code(stored, 2, NATIVE) * scale, _code(stored, 3, NATIVE) * scale
        if QUANTISED < DIM:
            # Codes are 0 where these values are not, and these where codes are not.
            low, high = tail.to(tl.int32), (tail >> 32).to(tl.int32)
            a, b, c, d = a + _lower(low), b + _upper(low), c + _lower(high), d + _upper(high)
        even, odd = tl.join(a.to(DTYPE), c.to(DTYPE)), tl.join(b.to(DTYPE), d.to(DTYPE))
        even, odd = even.reshape(N, HALF), odd.reshape(N, HALF)
    elif STORED.primitive_bitwidth == 16:
        even = stored.to(tl.uint16).to(STORED, bitcast=True).to(DTYPE)
        odd = (stored >> 16).to(tl.uint16).to(STORED, bitcast=True).to(DTYPE)
    else:
        even, odd = stored.reshape(N, HALF, 2).split()
        even, odd = even.to(DTYPE), odd.to(DTYPE)
    return even, odd


@triton.jit
def _code(words, I: tl.constexpr, NATIVE: tl.constexpr):
    """The e4m3 code in byte I of int32 words, in fp32."""
    if NATIVE:
        value = (words >> 8 * I).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # The second shift copies the sign; what stays is the sign, and the other bits as those of 2^-120 of the value.
        bits = ((words << 24 - 8 * I) >> 4) & -0x78100000
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return value


@triton.jit
def _lower(words):
    """The bf16 value in the lower half of int32 words, in fp32."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _upper(words):
    """The one in the upper half."""
    return (words & -0x10000).to(tl.float32, bitcast=True)
