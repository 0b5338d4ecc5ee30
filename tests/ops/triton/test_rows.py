"""Rows of paged caches in kernels, byte by byte (docs/model.md, "Row formats")."""

import pytest
import torch
import triton
import triton.language as tl

from testing.ops import codecs
from testing.ops.numeric import assert_exact, f64, integers, normal
from testing.ops.paging import make_cache
from vllm_deepseek_v4flash.ops.rows import RowFormat
from vllm_deepseek_v4flash.ops.triton.rows import (
    Rows,
    check_alignment,
    layout_of,
    load_rows,
    locate,
    rows_of,
    store_rows,
)

N, ROWS = 4, 3
LENGTHS = [8, 5]  # three pages and two
FORMATS = {
    "fp32": RowFormat.plain(48, torch.float32),
    "bf16": RowFormat.plain(128, torch.bfloat16),
    "fp16": RowFormat.plain(20, torch.float16),
    "fp8": RowFormat.fp8(128),
    "fp8 + bf16": RowFormat.fp8(80, 8),
    "fp8, part of a block": RowFormat.fp8(48),
    "fp4": RowFormat.fp4(64),
}


@triton.jit
def _load(cache: Rows, requests, numbers, valid, out, LAYOUT: tl.constexpr, N: tl.constexpr):
    ROWS: tl.constexpr = LAYOUT.rows
    n, d = tl.arange(0, N), tl.arange(0, LAYOUT.block)
    mask = tl.load(valid + n) != 0
    page, row = locate(cache, tl.load(requests + n), tl.load(numbers + n), mask, ROWS)
    x = load_rows(cache, page, row, mask, LAYOUT, N, out.dtype.element_ty)
    tl.store(out + n[:, None] * LAYOUT.block + d[None, :], x)


@triton.jit
def _store(x, cache: Rows, requests, numbers, valid, LAYOUT: tl.constexpr, N: tl.constexpr):
    ROWS: tl.constexpr = LAYOUT.rows
    n, d = tl.arange(0, N), tl.arange(0, LAYOUT.block)[None, :]
    mask = tl.load(valid + n) != 0
    page, row = locate(cache, tl.load(requests + n), tl.load(numbers + n), mask, ROWS)
    values = tl.load(x + n[:, None] * LAYOUT.dim + d, mask=d < LAYOUT.dim, other=0.0)
    store_rows(values, cache, page, row, mask, LAYOUT, N)


def arguments(cache, places, valid, device):
    requests, numbers = (torch.tensor(column, device=device) for column in zip(*places, strict=True))
    return rows_of(cache.rows), requests, numbers, torch.tensor(valid, dtype=torch.int32, device=device)


def sample(rng, count, fmt, device):
    """Rows whose Hadamard transform is exact where there is one, so that every byte is known."""
    if fmt.codec == "e2m1":
        return integers(rng, -50, 50, count, fmt.dim, device=device)
    return normal(rng, count, fmt.dim, device=device, scale=3)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_rows_are_loaded_from_their_pages(device, rng, native, fmt):
    check_loading(make_cache(fmt, ROWS, LENGTHS, rng, device), rng, native)


@pytest.mark.parametrize("fmt", [FORMATS["bf16"], FORMATS["fp8 + bf16"], FORMATS["fp4"]], ids=["bf16", "fp8", "fp4"])
def test_pages_may_lie_past_32_bit_offsets(device, rng, fmt):
    check_loading(make_cache(fmt, ROWS, LENGTHS, rng, device, far=True), rng, native=False)


def check_loading(cache, rng, native):
    fmt, device = cache.rows.format, cache.storage.device
    stored = [cache.put(request, sample(rng, length - 1, fmt, "cpu")) for request, length in enumerate(LENGTHS)]
    # The last row of each request was never written, and is asked for nowhere: NaN would show.
    places, valid = [(0, 6), (1, 0), (1, 4), (0, 2)], [1, 1, 0, 1]
    layout = layout_of(cache.rows, native)
    out = torch.empty((N, layout.block), device=device)
    _load[(1,)](*arguments(cache, places, valid, device), out, LAYOUT=layout, N=N)
    expected = torch.zeros(out.shape)
    for n, (request, number) in enumerate(places):
        if valid[n]:
            expected[n, : fmt.dim] = stored[request][number]
    assert_exact(out, expected)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_rows_are_stored_to_their_pages_alone(device, rng, native, fmt):
    cache, wanted = (make_cache(fmt, ROWS, LENGTHS, torch.Generator().manual_seed(1), device) for _ in range(2))
    x = sample(rng, N, fmt, device)
    places, valid = [(0, 7), (1, 1), (0, 0), (1, 4)], [1, 1, 0, 1]
    _store[(1,)](x, *arguments(cache, places, valid, device), LAYOUT=layout_of(cache.rows, native), N=N)
    for n, (request, number) in enumerate(places):
        if valid[n]:
            wanted.put_bytes(*wanted.place(request, number), *codecs.encode(f64(x[n]).tolist(), fmt))
    assert torch.equal(cache.bytes, wanted.bytes)


def test_a_bf16_part_at_an_odd_byte_is_refused():
    with pytest.raises(ValueError, match=r"even number of quantised values before bf16 ones, got 7 of 9"):
        check_alignment(RowFormat.fp8(9, 2))
    check_alignment(RowFormat.fp8(7))
