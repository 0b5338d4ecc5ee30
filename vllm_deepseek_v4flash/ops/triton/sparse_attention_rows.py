"""Rows of a paged cache in two steps, so that a tile is loaded while the one before it is multiplied.

`fetch` starts the loads and `decode` takes what has arrived. `ops/rows.py` defines the layout of a row. Whole words are
loaded: bytes and halves of words would take a register each, and be copied from round to round of a loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rows import PagedRows
from .codecs import power_of_two


class Fetched(NamedTuple):
    """What is stored of N rows, inside a kernel."""

    stored: Any
    """int32 [N, block // 64, 16], four e4m3 codes each; int32 [N, block // 2], two 16-bit values; [N, block] fp32."""
    scale: Any
    """uint8 [N, block // 64] of e4m3 rows."""
    tail: Any
    """int64 like `stored`, four bf16 values each where an e4m3 row has these instead of codes."""


def check_words(cache: PagedRows) -> None:
    """Raise ValueError for rows whose parts do not start at multiples of the words that `fetch` reads."""
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
def fetch(data, scales, valid, LAYOUT: tl.constexpr):
    """What is stored at the addresses [N] of rows' data and scales; not read where `valid` [N] is False."""
    scale, tail = tl.zeros((1,), tl.uint8), tl.zeros((1,), tl.int64)
    if LAYOUT.codec == "e4m3":
        g = tl.arange(0, LAYOUT.block // 64)[None, :]
        mask = valid[:, None] & (g < LAYOUT.scales)
        scale = tl.load(scales[:, None] + g, mask=mask, other=127)  # [N, BLOCK // 64]
        w = g[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        words = data.to(tl.pointer_type(tl.int32))[:, None, None] + w
        mask = valid[:, None, None] & (w < LAYOUT.quantised // 4)
        stored = tl.load(words, mask=mask, other=0)  # [N, BLOCK // 64, 16]
        if LAYOUT.quantised < LAYOUT.dim:
            words = (data + LAYOUT.quantised).to(tl.pointer_type(tl.int64))[:, None, None]
            words = words + (w - LAYOUT.quantised // 4)
            in_tail = (w >= LAYOUT.quantised // 4) & (w < LAYOUT.dim // 4)
            tail = tl.load(words, mask=valid[:, None, None] & in_tail, other=0)  # [N, BLOCK // 64, 16]
    elif data.dtype.element_ty.primitive_bitwidth == 16:
        w = tl.arange(0, LAYOUT.block // 2)[None, :]
        words = data.to(tl.pointer_type(tl.int32))[:, None] + w
        stored = tl.load(words, mask=valid[:, None] & (w < LAYOUT.dim // 2), other=0)  # [N, BLOCK // 2]
    else:
        d = tl.arange(0, LAYOUT.block)[None, :]
        stored = tl.load(data[:, None] + d, mask=valid[:, None] & (d < LAYOUT.dim), other=0.0)  # [N, BLOCK]
    return Fetched(stored, scale, tail)


@triton.jit
def decode(fetched: Fetched, LAYOUT: tl.constexpr, N: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """The even and the odd values of fetched rows, [N, block // 2] of DTYPE; 0 where nothing was read."""
    HALF: tl.constexpr = LAYOUT.block // 2
    NATIVE: tl.constexpr = LAYOUT.native
    stored = fetched.stored
    if LAYOUT.codec == "e4m3":
        # a, b, c, d = (codes * scales[..., None]).unflatten(-1, (-1, 4)).unbind(-1)
        scale = power_of_two(fetched.scale)[:, :, None]
        a, b = _code(stored, 0, NATIVE) * scale, _code(stored, 1, NATIVE) * scale
        c, d = _code(stored, 2, NATIVE) * scale, _code(stored, 3, NATIVE) * scale
        if LAYOUT.quantised < LAYOUT.dim:
            # Codes are 0 where these values are not, and these where codes are not.
            low, high = fetched.tail.to(tl.int32), (fetched.tail >> 32).to(tl.int32)
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
