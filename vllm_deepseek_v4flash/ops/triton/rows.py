"""Rows of a paged cache inside kernels (`ops/rows.py` defines the layout).

Addresses are 64-bit; what a mask leaves out is neither read nor written.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows import PagedRows, RowFormat
from .codecs import (
    decode_e2m1,
    decode_e4m3,
    divided,
    encode_e2m1,
    encode_e4m3,
    magnitude,
    power_of_two,
    scale_byte,
)
from .hadamard import hadamard
from .launch import Pointer, block


class Rows(NamedTuple):
    """A paged cache; strides in elements."""

    pages: Pointer
    """[P, >= rows of a page * elements of a row]"""
    page_stride: int
    table: Pointer | None
    """[R, B] int32, the pages of each request; None if rows are addressed by slots."""
    table_stride: int | None


class RowLayout(NamedTuple):
    """How a page stores its rows, for which a kernel is compiled."""

    rows: int
    """Rows of a page."""
    codec: str
    dim: int
    quantised: int
    data: int
    """Elements of a row's data part."""
    scales: int
    block: int
    """The power of two that holds `dim`."""
    native: bool
    """Whether the device converts e4m3."""


def rows_of(cache: PagedRows) -> Rows:
    """A kernel's argument for a cache."""
    check_alignment(cache.format)
    return Rows(cache.pages, cache.pages.stride(0), cache.block_table, cache.block_table.stride(0))


def layout_of(cache: PagedRows, native: bool, smallest: int = 1) -> RowLayout:
    """The layout of a cache; tiles of a row hold at least `smallest` values."""
    fmt = cache.format
    size = block(fmt.dim, max(smallest, 16 if fmt.codec == "plain" else fmt.block))
    return RowLayout(
        cache.rows_per_page, fmt.codec, fmt.dim, fmt.quantised, fmt.data_size, fmt.num_scales, size, native
    )


def check_alignment(fmt: RowFormat) -> None:
    """Raise ValueError for a row whose bf16 part would begin at an odd byte."""
    if fmt.codec == "e4m3" and fmt.quantised < fmt.dim and (fmt.quantised % 2 or fmt.data_size % 2):
        raise ValueError(
            f"Triton kernels need an even number of quantised values before bf16 ones, got {fmt.quantised} of "
            f"{fmt.dim}: set VLLM_DEEPSEEK_V4FLASH_OPS=reference, or a bf16 cache with --kv-cache-dtype bfloat16"
        )


@triton.jit
def locate(cache: Rows, request, row, mask, ROWS: tl.constexpr):
    """The page (int64) and the row within it (int32) of row numbers `row` of `request`; 0 where `mask` is False."""
    # page = block_table[request, row // ROWS]
    at = cache.table + request.to(tl.int64) * cache.table_stride + row // ROWS
    page = tl.load(at, mask=mask, other=0)  # the shape of row
    return page.to(tl.int64), row % ROWS


@triton.jit
def load_rows(cache: Rows, page, row, valid, LAYOUT: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr):
    """Rows at (page, row) [N] as [N, block] of DTYPE: zero where `valid` is False and beyond `dim`.

    4-bit rows stay Hadamard-transformed.
    """
    base = cache.pages + page * cache.page_stride
    if LAYOUT.codec == "plain":
        d = tl.arange(0, LAYOUT.block)[None, :]
        at = base[:, None] + row[:, None] * LAYOUT.data + d
        rows = tl.load(at, mask=valid[:, None] & (d < LAYOUT.dim), other=0.0).to(DTYPE)  # [N, BLOCK]
    else:
        NATIVE: tl.constexpr = LAYOUT.native
        SHARE: tl.constexpr = 32 if LAYOUT.codec == "e2m1" else 64  # values that share one scale
        GROUPS: tl.constexpr = LAYOUT.block // SHARE
        g = tl.arange(0, GROUPS)[None, :]
        scales = base[:, None] + LAYOUT.rows * LAYOUT.data + row[:, None] * LAYOUT.scales + g
        byte = tl.load(scales, mask=valid[:, None] & (g < LAYOUT.scales), other=127)  # [N, GROUPS]
        scale = power_of_two(byte)[:, :, None]
        data = (base + row * LAYOUT.data)[:, None, None]
        # rows = codes.unflatten(-1, (GROUPS, SHARE)) * scales[..., None]
        if LAYOUT.codec == "e2m1":
            byte = g[:, :, None] * (SHARE // 2) + tl.arange(0, SHARE // 2)[None, None, :]
            mask = valid[:, None, None] & (byte < LAYOUT.data)
            both = tl.load(data + byte, mask=mask, other=0)  # [N, GROUPS, SHARE // 2]
            values = tl.join(decode_e2m1(both & 15), decode_e2m1(both >> 4)).reshape(N, GROUPS, SHARE)
            values = (values * scale).to(DTYPE)
        else:
            d = g[:, :, None] * SHARE + tl.arange(0, SHARE)[None, None, :]
            mask = valid[:, None, None] & (d < LAYOUT.quantised)
            code = tl.load(data + d, mask=mask, other=0)  # [N, GROUPS, SHARE]
            values = (decode_e4m3(code, NATIVE) * scale).to(DTYPE)
            if LAYOUT.quantised < LAYOUT.dim:
                tail = (data + LAYOUT.quantised).to(tl.pointer_type(tl.bfloat16)) + (d - LAYOUT.quantised)
                in_tail = (d >= LAYOUT.quantised) & (d < LAYOUT.dim)
                mask = valid[:, None, None] & in_tail
                kept = tl.load(tail, mask=mask, other=0.0).to(DTYPE)  # [N, GROUPS, SHARE]
                values = tl.where(in_tail, kept, values)
        rows = values.reshape(N, LAYOUT.block)
    return rows


@triton.jit
def store_rows(x, cache: Rows, page, row, valid, LAYOUT: tl.constexpr, N: tl.constexpr):
    """Quantise x [N, block] fp32 (zero beyond `dim`) and store it at (page, row) [N] where `valid`.

    4-bit rows are Hadamard-transformed first; their `block` is their `dim`.
    """
    base = cache.pages + page * cache.page_stride
    if LAYOUT.codec == "plain":
        d = tl.arange(0, LAYOUT.block)[None, :]
        at = base[:, None] + row[:, None] * LAYOUT.data + d
        mask = valid[:, None] & (d < LAYOUT.dim)
        tl.store(at, x.to(cache.pages.dtype.element_ty), mask=mask)  # [N, BLOCK]
    else:
        DIM: tl.constexpr = LAYOUT.dim
        NATIVE: tl.constexpr = LAYOUT.native
        SHARE: tl.constexpr = 32 if LAYOUT.codec == "e2m1" else 64
        LARGEST: tl.constexpr = 6.0 if LAYOUT.codec == "e2m1" else 448.0
        FLOOR: tl.constexpr = 6.0 * 2.0**-126 if LAYOUT.codec == "e2m1" else 1e-4
        GROUPS: tl.constexpr = LAYOUT.block // SHARE
        if LAYOUT.codec == "e2m1":
            x = hadamard(x, N, DIM)
        # scales = 2 ** (x.unflatten(-1, (GROUPS, SHARE)).abs().amax(-1).clamp(min=FLOOR) / LARGEST).log2().ceil()
        g = tl.arange(0, GROUPS)[None, :]
        d = g[:, :, None] * SHARE + tl.arange(0, SHARE)[None, None, :]
        grouped = x.reshape(N, GROUPS, SHARE)
        byte = scale_byte(tl.max(tl.where(d < LAYOUT.quantised, magnitude(grouped), 0.0), axis=2), FLOOR, LARGEST)
        scales = base[:, None] + LAYOUT.rows * LAYOUT.data + row[:, None] * LAYOUT.scales + g
        tl.store(scales, byte, mask=valid[:, None] & (g < LAYOUT.scales))  # [N, GROUPS]
        # codes = (x.unflatten(-1, (GROUPS, SHARE)) / scales[..., None]).clamp(-LARGEST, LARGEST)
        scaled = divided(grouped, byte[:, :, None], LARGEST)
        data = (base + row * LAYOUT.data)[:, None, None]
        if LAYOUT.codec == "e2m1":
            low, high = encode_e2m1(scaled).reshape(N, GROUPS, SHARE // 2, 2).split()
            at = g[:, :, None] * (SHARE // 2) + tl.arange(0, SHARE // 2)[None, None, :]
            mask = valid[:, None, None] & (at < LAYOUT.data)
            tl.store(data + at, low | high << 4, mask=mask)  # [N, GROUPS, SHARE // 2]
        else:
            mask = valid[:, None, None] & (d < LAYOUT.quantised)
            tl.store(data + d, encode_e4m3(scaled, NATIVE), mask=mask)  # [N, GROUPS, SHARE]
            if LAYOUT.quantised < LAYOUT.dim:
                tail = (data + LAYOUT.quantised).to(tl.pointer_type(tl.bfloat16)) + (d - LAYOUT.quantised)
                in_tail = (d >= LAYOUT.quantised) & (d < LAYOUT.dim)
                mask = valid[:, None, None] & in_tail
                tl.store(tail, grouped.to(tl.bfloat16), mask=mask)  # [N, GROUPS, SHARE]
