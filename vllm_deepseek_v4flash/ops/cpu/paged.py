"""Rows of paged caches by address (the formats of `ops/rows.py`)."""

from __future__ import annotations

import numpy as np

from ..rows import PagedRows
from .arithmetic import INFINITY, ONE, ZERO
from .compiling import CACHE_FIELDS, Cache, helper
from .memory import (
    CODES,
    bits,
    fetch,
    from_bf16,
    get,
    get_i32,
    get_u8,
    load,
    number,
    put,
    put_u8,
    size_of,
    store,
    to_bf16,
)

E4M3, E2M1 = 8, 4
"""Codecs, next to the dtype codes of plain rows."""
NO_CACHE: Cache = (0,) * CACHE_FIELDS
_FP8_MAX, _FP8_FLOOR = np.float32(448.0), np.float32(1e-4)
_FP4_MAX, _FP4_FLOOR = np.float32(6.0), np.float32(6.0 * 2.0**-126)
_TWO_TO_120 = np.float32(2.0**120)
_TWO_TO_14 = np.float32(2.0**14)
_TWO_TO_126 = np.float32(2.0**126)
_NAN = np.float32(np.nan)
NAN_SCALE = 255
"""The scale of a block with a value that is not finite, whose codes are 0."""


def cache(rows: PagedRows) -> Cache:
    """`rows` for kernels: pages, bytes per page, rows per page, codec, dim, quantised, block table, its stride."""
    fmt, pages, table = rows.format, rows.pages, rows.block_table
    codec = CODES[fmt.dtype] if fmt.codec == "plain" else E4M3 if fmt.codec == "e4m3" else E2M1
    return (
        pages.data_ptr(), pages.stride(0) * pages.element_size(), rows.rows_per_page, codec, fmt.dim, fmt.quantised,
        table.data_ptr(), table.stride(0),
    )  # fmt: skip


@helper
def page_of(cache, request, row):
    """The address of the page of row number `row` of a request, and the row within it."""
    pages, page_bytes, per_page, _, _, _, table, stride = cache
    return pages + page_bytes * get_i32(table, request * stride + row // per_page), row % per_page


@helper
def page_at(cache, slot):
    """The address of a slot's page, and the row within it."""
    pages, page_bytes, per_page, _, _, _, _, _ = cache
    return pages + page_bytes * (slot // per_page), slot % per_page


@helper
def read_row(cache, page, row, out):
    """One row of the page at an address as fp32; 4-bit rows stay transformed."""
    _, _, per_page, codec, dim, quantised, _, _ = cache
    if codec == E4M3:
        data, blocks = quantised + 2 * (dim - quantised), (quantised + 63) // 64
        codes, scales = page + row * data, page + per_page * data + row * blocks
        for block in range(blocks):
            scale = _power_of_two(get_u8(scales, block))
            for i in range(64 * block, min(64 * block + 64, quantised)):
                put(out, i, _from_e4m3(get_u8(codes, i)) * scale)
        tail = codes + quantised
        for i in range(dim - quantised):
            # Byte by byte: an odd `quantised` leaves the tail at odd addresses.
            put(out, quantised + i, from_bf16(get_u8(tail, 2 * i) | get_u8(tail, 2 * i + 1) << 8))
    elif codec == E2M1:
        codes, scales = page + row * (dim // 2), page + per_page * (dim // 2) + row * (dim // 32)
        for block in range(dim // 32):
            scale = _power_of_two(get_u8(scales, block))
            for i in range(16 * block, 16 * block + 16):
                put(out, 2 * i, _from_e2m1(get_u8(codes, i) & 15) * scale)
                put(out, 2 * i + 1, _from_e2m1(get_u8(codes, i) >> 4) * scale)
    else:
        load(page + row * dim * (4 if codec == 0 else 2), codec, dim, out)


@helper
def fetch_row(cache, request, row):
    """Prefetch the data of an e4m3 or plain row."""
    codec, dim, quantised = cache[3:6]
    size = quantised + 2 * (dim - quantised) if codec == E4M3 else dim * size_of(codec)
    page, row = page_of(cache, request, row)
    fetch(page + row * size, size)


@helper
def read_rows(cache, request, first, count, out):
    """`count` rows of a request, starting at number `first`."""
    _, _, per_page, codec, dim, _, _, _ = cache
    done = 0
    while done < count:
        page, row = page_of(cache, request, first + done)
        here = min(per_page - row, count - done)
        if codec in (E4M3, E2M1):
            for i in range(here):
                read_row(cache, page, row + i, out + 4 * (done + i) * dim)
        else:
            load(page + row * dim * size_of(codec), codec, here * dim, out + 4 * done * dim)
        done += here


@helper
def write_row(cache, page, row, values):
    """Store `values` (fp32, transformed in place for 4-bit rows) as one row of the page at an address."""
    _, _, per_page, codec, dim, quantised, _, _ = cache
    if codec == E4M3:
        data, blocks = quantised + 2 * (dim - quantised), (quantised + 63) // 64
        codes, scales = page + row * data, page + per_page * data + row * blocks
        for block in range(blocks):
            start, end = 64 * block, min(64 * block + 64, quantised)
            scale = _scale(values, start, end, _FP8_MAX, _FP8_FLOOR)
            put_u8(scales, block, scale)
            inverse = _power_of_two(254 - scale)
            if scale == NAN_SCALE:
                for i in range(start, end):
                    put_u8(codes, i, 0)
            else:
                for i in range(start, end):
                    put_u8(codes, i, _to_e4m3(get(values, i) * inverse))
        tail = codes + quantised
        for i in range(dim - quantised):
            half = to_bf16(get(values, quantised + i))
            put_u8(tail, 2 * i, half)
            put_u8(tail, 2 * i + 1, half >> 8)
    elif codec == E2M1:
        hadamard(values, dim)
        codes, scales = page + row * (dim // 2), page + per_page * (dim // 2) + row * (dim // 32)
        for block in range(dim // 32):
            scale = _scale(values, 32 * block, 32 * block + 32, _FP4_MAX, _FP4_FLOOR)
            put_u8(scales, block, scale)
            inverse = _power_of_two(254 - scale)
            for i in range(16 * block, 16 * block + 16):
                low, high = _to_e2m1(get(values, 2 * i) * inverse), _to_e2m1(get(values, 2 * i + 1) * inverse)
                put_u8(codes, i, 0 if scale == NAN_SCALE else low | high << 4)
    else:
        store(page + row * dim * (4 if codec == 0 else 2), codec, dim, values)


@helper
def round_to_e2m1(values, dim):
    """`values` as a 4-bit cache would return them, transformed."""
    hadamard(values, dim)
    for block in range(dim // 32):
        scale = _scale(values, 32 * block, 32 * block + 32, _FP4_MAX, _FP4_FLOOR)
        inverse, power = _power_of_two(254 - scale), _power_of_two(scale)
        for i in range(32 * block, 32 * block + 32):
            put(values, i, (ZERO if scale == NAN_SCALE else _from_e2m1(_to_e2m1(get(values, i) * inverse))) * power)


@helper
def hadamard(values, dim):
    """The orthonormal transform in place, with the butterflies of `ops/hadamard.py` in their order."""
    step = 1
    while step < dim:
        for start in range(0, dim, 2 * step):
            for i in range(start, start + step):
                a, b = get(values, i), get(values, i + step)
                put(values, i, a + b)
                put(values, i + step, a - b)
        step *= 2
    factor = np.float32(np.float64(dim) ** -0.5)
    for i in range(dim):
        put(values, i, get(values, i) * factor)


@helper
def _power_of_two(scale):
    return number(scale << 23)


@helper
def _scale(values, start, end, largest, floor):
    """The ue8m0 byte of a block: 2^ceil(log2(max(|values|, floor) / largest)); NAN_SCALE where one is not finite."""
    top = floor
    for i in range(start, end):
        size = abs(get(values, i))
        top = max(top, size if size < INFINITY else INFINITY)
    whole = bits(top * np.float32(ONE / largest))
    return (whole >> 23) + (1 if whole & 0x7FFFFF else 0)


@helper
def _from_e4m3(code):
    magnitude = code & 0x7F
    # After a shift its fields are those of fp32 except for the exponent's bias; the same holds for e2m1.
    value = number(magnitude << 20 | (code & 0x80) << 24) * _TWO_TO_120
    return value if magnitude != 0x7F else _NAN


@helper
def _to_e4m3(value):
    whole = bits(min(max(value, -_FP8_MAX), _FP8_MAX))
    sign, magnitude = whole >> 24 & 0x80, whole & 0x7FFFFFFF
    if value != value:
        return 0x7F
    if magnitude < 0x3C800000:
        # Below 2^-6 codes are multiples of 2^-9, to which a sum with 2^14 rounds.
        return sign | (bits(number(magnitude) + _TWO_TO_14) - 0x46800000)
    return sign | (magnitude - (120 << 23) + 0x7FFFF + (magnitude >> 20 & 1)) >> 20


@helper
def _from_e2m1(code):
    return number((code & 7) << 22 | (code & 8) << 28) * _TWO_TO_126


@helper
def _to_e2m1(value):
    size = abs(value)
    # Each threshold is halfway between two codes and rounds to the even one.
    code = (size > 0.25) + (size >= 0.75) + (size > 1.25) + (size >= 1.75)
    code += (size > 2.5) + (size >= 3.5) + (size > 5.0)
    return code | 8 if value < ZERO else code | 0
