"""Rows of a paged cache inside kernels (the layout is `ops/rows.py`'s).

A kernel receives a cache as `*row_args(cache)` and `**row_constants(cache)`: its pages and block table, and what is
known when it is compiled. Addresses are 64-bit; what a mask leaves out is neither read nor written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..rows import PagedRows, RowFormat
from .codecs import decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3, power_of_two, scale_byte
from .hadamard import hadamard
from .launch import block


def row_args(cache: PagedRows) -> tuple[torch.Tensor, int, torch.Tensor, int]:
    """(pages, page_stride, table, table_stride), in elements."""
    check_alignment(cache.format)
    return cache.pages, cache.pages.stride(0), cache.block_table, cache.block_table.stride(0)


def check_alignment(fmt: RowFormat) -> None:
    """Raise ValueError for a row whose bf16 part would begin at an odd byte."""
    if fmt.codec == "e4m3" and fmt.quantised < fmt.dim and (fmt.quantised % 2 or fmt.data_size % 2):
        raise ValueError(
            f"Triton kernels need an even number of quantised values before bf16 ones, got {fmt.quantised} of "
            f"{fmt.dim}: set VLLM_DEEPSEEK_V4FLASH_OPS=reference, or a bf16 cache with --kv-cache-dtype bfloat16"
        )


def format_constants(fmt: RowFormat) -> dict[str, Any]:
    """The compile-time parameters of a row format."""
    return {
        "CODEC": fmt.codec,
        "DIM": fmt.dim,
        "QUANTISED": fmt.quantised,
        "DATA": fmt.data_size,
        "SCALES": fmt.num_scales,
        "BLOCK_D": block(fmt.dim, 16 if fmt.codec == "plain" else fmt.block),
    }


@triton.jit
def locate(table, table_stride, request, row, mask, ROWS: tl.constexpr):
    """The page (int64) and the row within it (int32) of row numbers `row` of `request`; 0 where `mask` is False."""
    page = tl.load(table + request.to(tl.int64) * table_stride + row // ROWS, mask=mask, other=0)
    return page.to(tl.int64), row % ROWS


@triton.jit
def load_rows(
    pages, page_stride, page, row, valid,
    N: tl.constexpr, ROWS: tl.constexpr, CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr,
    DATA: tl.constexpr, SCALES: tl.constexpr, BLOCK_D: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows at (page, row) [N] as [N, BLOCK_D] of DTYPE: zero where `valid` is False and beyond DIM.

    4-bit rows stay Hadamard-transformed.
    """
    base = pages + page * page_stride
    if CODEC == "plain":
        d = tl.arange(0, BLOCK_D)[None, :]
        at = base[:, None] + row[:, None] * DATA + d
        rows = tl.load(at, mask=valid[:, None] & (d < DIM), other=0.0).to(DTYPE)
    else:
        SHARE: tl.constexpr = 32 if CODEC == "e2m1" else 64  # values that share one scale
        GROUPS: tl.constexpr = BLOCK_D // SHARE
        g = tl.arange(0, GROUPS)[None, :]
        scales = base[:, None] + ROWS * DATA + row[:, None] * SCALES + g
        scale = power_of_two(tl.load(scales, mask=valid[:, None] & (g < SCALES), other=127))[:, :, None]
        data = (base + row * DATA)[:, None, None]
        if CODEC == "e2m1":
            byte = g[:, :, None] * (SHARE // 2) + tl.arange(0, SHARE // 2)[None, None, :]
            both = tl.load(data + byte, mask=valid[:, None, None] & (byte < DATA), other=0)
            values = tl.join(decode_e2m1(both & 15), decode_e2m1(both >> 4)).reshape(N, GROUPS, SHARE)
            values = (values * scale).to(DTYPE)
        else:
            d = g[:, :, None] * SHARE + tl.arange(0, SHARE)[None, None, :]
            code = tl.load(data + d, mask=valid[:, None, None] & (d < QUANTISED), other=0)
            values = (decode_e4m3(code, NATIVE) * scale).to(DTYPE)
            if QUANTISED < DIM:
                tail = (data + QUANTISED).to(tl.pointer_type(tl.bfloat16)) + (d - QUANTISED)
                in_tail = (d >= QUANTISED) & (d < DIM)
                kept = tl.load(tail, mask=valid[:, None, None] & in_tail, other=0.0).to(DTYPE)
                values = tl.where(in_tail, kept, values)
        rows = values.reshape(N, BLOCK_D)
    return rows


@triton.jit
def store_rows(
    x, pages, page_stride, page, row, valid,
    N: tl.constexpr, ROWS: tl.constexpr, CODEC: tl.constexpr, DIM: tl.constexpr, QUANTISED: tl.constexpr,
    DATA: tl.constexpr, SCALES: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_DIM: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Quantise x [N, BLOCK_D] fp32 (zero beyond DIM) and store it at (page, row) [N] where `valid`.

    4-bit rows are Hadamard-transformed first; they have BLOCK_D == DIM.
    """
    base = pages + page * page_stride
    if CODEC == "plain":
        d = tl.arange(0, BLOCK_D)[None, :]
        target = base[:, None] + row[:, None] * DATA + d
        tl.store(target, x.to(pages.dtype.element_ty), mask=valid[:, None] & (d < DIM))
    else:
        SHARE: tl.constexpr = 32 if CODEC == "e2m1" else 64
        LARGEST: tl.constexpr = 6.0 if CODEC == "e2m1" else 448.0
        FLOOR: tl.constexpr = 6.0 * 2.0**-126 if CODEC == "e2m1" else 1e-4
        GROUPS: tl.constexpr = BLOCK_D // SHARE
        if CODEC == "e2m1":
            x = hadamard(x, N, DIM, LOG2_DIM)
        g = tl.arange(0, GROUPS)[None, :]
        d = g[:, :, None] * SHARE + tl.arange(0, SHARE)[None, None, :]
        grouped = x.reshape(N, GROUPS, SHARE)
        byte = scale_byte(tl.max(tl.where(d < QUANTISED, tl.abs(grouped), 0.0), axis=2), FLOOR, LARGEST)
        scales = base[:, None] + ROWS * DATA + row[:, None] * SCALES + g
        tl.store(scales, byte, mask=valid[:, None] & (g < SCALES))
        scaled = grouped * power_of_two(254 - byte.to(tl.int32))[:, :, None]
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
        data = (base + row * DATA)[:, None, None]
        if CODEC == "e2m1":
            low, high = encode_e2m1(scaled).reshape(N, GROUPS, SHARE // 2, 2).split()
            at = g[:, :, None] * (SHARE // 2) + tl.arange(0, SHARE // 2)[None, None, :]
            tl.store(data + at, low | high << 4, mask=valid[:, None, None] & (at < DATA))
        else:
            tl.store(data + d, encode_e4m3(scaled, NATIVE), mask=valid[:, None, None] & (d < QUANTISED))
            if QUANTISED < DIM:
                tail = (data + QUANTISED).to(tl.pointer_type(tl.bfloat16)) + (d - QUANTISED)
                in_tail = (d >= QUANTISED) & (d < DIM)
                tl.store(tail, grouped.to(tl.bfloat16), mask=valid[:, None, None] & in_tail)
