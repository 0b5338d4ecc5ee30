"""Cached rows: the codecs bit by bit, and the addressing byte by byte."""

import itertools
import math

import pytest
import torch

from testing.ops import codecs
from testing.ops.numeric import assert_exact, integers, normal
from testing.ops.paging import POISON, make_cache
from vllm_deepseek_v4flash.ops.rows import PagedRows, RowFormat, read_rows, write_rows

FORMATS = {
    "fp32": RowFormat.plain(24, torch.float32),
    "fp16": RowFormat.plain(24, torch.float16),
    "bf16": RowFormat.plain(24, torch.bfloat16),
    "fp8": RowFormat.fp8(192, 64),
    "fp8-no-tail": RowFormat.fp8(128),
    "fp8-short-block": RowFormat.fp8(48, 8),
    "fp8-one-and-a-bit": RowFormat.fp8(80, 8),
    "fp4": RowFormat.fp4(64),
}


@pytest.fixture(params=list(FORMATS.values()), ids=list(FORMATS))
def fmt(request):
    return request.param


def values_for(fmt, rng, count, dtype=torch.float32):
    # The 64 values of a 4-bit row are whole, so that the transform is exact and no rounding is open.
    if fmt.codec == "e2m1":
        return integers(rng, -6, 6, count, fmt.dim, dtype=dtype)
    # Blocks of very different sizes, so that a scale taken from the wrong block shows.
    spread = 2.0 ** torch.randint(-12, 12, (count, -(-fmt.dim // 32)), generator=rng).repeat_interleave(32, 1)
    return (normal(rng, count, fmt.dim) * spread[:, : fmt.dim]).to(dtype)


def one_row(fmt, device, data, scales):
    """What `read_rows` makes of these bytes."""
    cache = make_cache(fmt, 1, [1], torch.Generator().manual_seed(0), device)
    page, row = cache.place(0, 0)
    cache.put_bytes(page, row, bytes(data), bytes(scales))
    at = (torch.tensor([page], device=device), torch.tensor([row], device=device))
    return read_rows(cache.rows, *at, torch.tensor([True], device=device))[0]


def stored(fmt, device, values):
    """The data and scale bytes of one row after `write_rows`."""
    cache = make_cache(fmt, 1, [1], torch.Generator().manual_seed(0), device)
    page, row = cache.place(0, 0)
    at = (torch.tensor([page], device=device), torch.tensor([row], device=device))
    write_rows(cache.rows, *at, torch.as_tensor(values, dtype=torch.float32, device=device)[None])
    return cache.raw(0, 0)


@pytest.mark.parametrize("scale", [32, 105, 126, 127, 128, 200])
def test_e4m3_decodes_every_finite_code(device, scale):
    codes = [code for code in range(256) if code & 0x7F != 0x7F] + [0, 0]
    actual = one_row(RowFormat.fp8(256), device, codes, [scale] * 4)
    assert_exact(actual, torch.tensor([codecs.e4m3(code) * 2.0 ** (scale - 127) for code in codes]))


def test_e2m1_decodes_every_code_low_nibble_first(device):
    pairs = [(code, 15 - code) for code in range(16)] * 2
    actual = one_row(RowFormat.fp4(64), device, [low | high << 4 for low, high in pairs], [127, 130])
    expected = [codecs.e2m1(code) for pair in pairs for code in pair]
    assert_exact(actual, torch.tensor([v * (1 if i < 32 else 8) for i, v in enumerate(expected)]))


def test_e4m3_rounds_to_the_nearest_code_and_ties_to_the_even_one(device):
    # Every code, every midpoint and both neighbours of every midpoint, subnormals and the largest code included.
    magnitudes = codecs.E4M3_MAGNITUDES
    probes = list(magnitudes)
    for low, high in itertools.pairwise(magnitudes):
        middle = torch.tensor((low + high) / 2)
        probes += [middle.item(), *(torch.nextafter(middle, torch.tensor(x)).item() for x in (0.0, 500.0))]
    probes += [-p for p in probes]
    fmt = RowFormat.fp8(64)
    for start in range(0, len(probes), 63):
        row = [448.0, *probes[start : start + 63]]  # 448 makes the scale of the block 1
        row += [0.0] * (64 - len(row))
        data, scales = stored(fmt, device, row)
        assert scales == bytes([127])
        assert [codecs.e4m3(code) for code in data] == [
            math.copysign(codecs.e4m3(codecs.nearest(v, magnitudes)), v) for v in row
        ]


def test_e2m1_rounds_to_the_nearest_code_and_ties_to_the_even_one(device):
    magnitudes = codecs.E2M1_MAGNITUDES
    probes = list(magnitudes)
    for low, high in itertools.pairwise(magnitudes):
        # 2^-10 off the tie still leaves every sum of the transform exact.
        probes += [(low + high) / 2 + shift for shift in (0, -(2.0**-10), 2.0**-10)]
    probes += [-p for p in probes if p]
    for start in range(0, len(probes), 31):
        block = [6.0, *probes[start : start + 31]]  # 6 makes the scale of the block 1
        wanted = [*block, *[0.0] * (64 - len(block))]
        # The transform is its own inverse: the stored row is the transform of this one.
        data, scales = stored(RowFormat.fp4(64), device, codecs.sylvester(wanted))
        codes = [nibble for byte in data for nibble in (byte & 15, byte >> 4)]
        assert scales[0] == 127
        assert [codecs.e2m1(c) for c in codes] == [
            math.copysign(codecs.e2m1(codecs.nearest(v, magnitudes)), v) for v in wanted
        ]


@pytest.mark.parametrize("exponent", [-10, -1, 0, 1, 7, 40])
def test_e4m3_scale_changes_right_above_448_times_a_power_of_two(device, exponent):
    edge = torch.tensor(448.0 * 2.0**exponent)
    rows = {
        127 + exponent: (edge.item(), torch.nextafter(edge, torch.tensor(0.0)).item()),
        128 + exponent: (torch.nextafter(edge, torch.tensor(torch.inf)).item(), 2 * edge.item()),
    }
    for scale, largest in rows.items():
        for amax in largest:
            for sign in (1, -1):
                data, scales = stored(RowFormat.fp8(64), device, [0.0] * 63 + [sign * amax])
                assert scales == bytes([scale]), amax
                # 448 is reached and never passed: right above the edge the code is that of 224.
                assert abs(codecs.e4m3(data[63])) == (224.0 if scale > 127 + exponent and amax < 2 * edge else 448.0)


@pytest.mark.parametrize("exponent", [-20, 0, 5])
def test_e2m1_scale_changes_right_above_6_times_a_power_of_two(device, exponent):
    edge = 6.0 * 2.0**exponent
    # All 64 transformed values are x / 8 up to their signs, and halving and doubling is exact.
    for amax, scale in ((edge, 127), (torch.nextafter(torch.tensor(edge), torch.tensor(torch.inf)).item(), 128)):
        data, scales = stored(RowFormat.fp4(64), device, [amax * 8.0] + [0.0] * 63)
        assert scales == bytes([scale + exponent] * 2)
        assert {codecs.e2m1(nibble) for byte in data for nibble in (byte & 15, byte >> 4)} == {
            6.0 if scale == 127 else 3.0
        }


@pytest.mark.parametrize("row", [[0.0] * 64, [1e-6] * 64, [1e-4] * 64, [-3e-7, *[0.0] * 63]])
def test_e4m3_floor_of_small_blocks(device, row):
    data, scales = stored(RowFormat.fp8(64), device, row)
    assert scales == bytes([127 - 22])  # ceil(log2(1e-4 / 448)) = -22
    values = torch.tensor(row).tolist()
    assert [codecs.e4m3(c) for c in data] == [
        math.copysign(codecs.e4m3(codecs.nearest(v * 2.0**22, codecs.E4M3_MAGNITUDES)), v) for v in values
    ]


def test_e2m1_floor_of_a_zero_row(device):
    data, scales = stored(RowFormat.fp4(64), device, [0.0] * 64)
    assert scales == bytes([1, 1])  # 2^-126, the smallest scale
    assert set(data) == {0}


@pytest.mark.parametrize("fmt", [RowFormat.fp8(192, 64), RowFormat.fp4(64)], ids=["fp8", "fp4"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_is_read_as_nan(device, rng, fmt, value):
    values = normal(rng, fmt.dim)
    whole = stored(fmt, device, values)
    values[fmt.block + 1] = value
    data, scales = stored(fmt, device, values)
    # The transform of a 4-bit row spreads the value over all blocks.
    blocks = range(2) if fmt.codec == "e2m1" else [1]
    actual = one_row(fmt, device, data, scales)
    for block in range(fmt.quantised // fmt.block):
        part = slice(block * fmt.block, (block + 1) * fmt.block)
        if block in blocks:
            assert scales[block] == 255
            assert actual[part].isnan().all()
        else:
            assert_exact(actual[part], one_row(fmt, device, *whole)[part])


@pytest.mark.parametrize("quantised", [1, 40, 41, 63, 65])
def test_last_block_may_be_short_and_odd(device, rng, quantised):
    fmt = RowFormat.fp8(quantised + 8, 8)
    row = normal(rng, fmt.dim).tolist()
    data, scales = stored(fmt, device, row)
    assert (data, scales) == codecs.encode(row, fmt)
    assert len(scales) == -(-quantised // 64)
    assert_exact(one_row(fmt, device, data, scales), torch.tensor(codecs.decode(data, scales, fmt)))


@pytest.mark.parametrize("dim", [32, 128, 256])
def test_fp4_rows_of_other_sizes_are_within_half_a_step(device, rng, dim):
    row = normal(rng, dim)
    data, scale_bytes = stored(RowFormat.fp4(dim), device, row)
    actual = torch.tensor(codecs.decode(data, scale_bytes, RowFormat.fp4(dim)))
    wanted = torch.tensor(codecs.sylvester(row.double().tolist()))
    scales = [codecs.ue8m0(codecs.scale_byte(b.abs().max().item(), 6.0, 0.0)) for b in wanted.split(32)]
    # Half a step of e2m1 below 2, 4 and 6 is 1/4, 1/2 and 1; 2^-20 covers the fp32 transform of |x| < 6.
    for block, code, scale in zip(wanted.split(32), actual.split(32), scales, strict=True):
        size = (block / scale).abs()
        half_step = torch.where(size < 2, 0.25, torch.where(size < 4, 0.5, 1.0)) * scale
        assert ((code - block).abs() <= half_step + 2.0**-20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_changes_its_rows_and_not_one_byte_more(device, rng, fmt, dtype):
    cache = make_cache(fmt, 5, [23], rng, device)
    numbers = [22, 0, 7, 8, 14, 3]
    values = values_for(fmt, rng, len(numbers) + 2, dtype)
    expected = cache.bytes
    places = [cache.place(0, n) for n in numbers]
    for place, value in zip(places, values.double().tolist(), strict=False):
        for span, content in zip(cache.spans(*place), codecs.encode(value, fmt), strict=True):
            expected[place[0], span] = torch.tensor(list(content), dtype=torch.uint8)
    # Padded tokens are first and last; their row is -1 % rows.
    padded = [(-1, 4), *places, (-3, 0)]
    order = [len(numbers), *range(len(numbers)), len(numbers) + 1]
    page, row = torch.tensor(padded, device=device).unbind(1)
    write_rows(cache.rows, page, row, values[order].to(device))
    assert torch.equal(cache.bytes, expected)


def test_read_gives_the_value_of_the_bytes(device, rng, fmt):
    cache = make_cache(fmt, 5, [13, 6], rng, device)
    stored = [cache.put(r, values_for(fmt, rng, n)) for r, n in ((0, 13), (1, 6))]
    request = torch.tensor([[0, 1, 0], [0, 0, 1]], device=device)
    number = torch.tensor([[12, 5, 0], [6, 4, 0]], device=device)
    actual = read_rows(cache.rows, *cache.rows.locate(request, number), torch.ones_like(number, dtype=torch.bool))
    expected = [
        [stored[r][n] for r, n in zip(*rn, strict=True)] for rn in zip(request.tolist(), number.tolist(), strict=True)
    ]
    assert_exact(actual, torch.stack([torch.stack(row) for row in expected]).float())


def test_invalid_rows_are_read_as_zeros(device, rng, fmt):
    cache = make_cache(fmt, 4, [8], rng, device)
    stored = cache.put(0, values_for(fmt, rng, 2))  # rows 2..7 stay NaN
    number = torch.tensor([1, 5, 0, 7], device=device)
    valid = torch.tensor([True, False, True, False], device=device)
    page, row = cache.rows.locate(torch.zeros_like(number), number)
    expected = torch.stack((stored[1], torch.zeros(fmt.dim), stored[0], torch.zeros(fmt.dim))).float()
    assert_exact(read_rows(cache.rows, page, row, valid), expected)
    # A place that does not exist is not followed either.
    page = page.where(valid, torch.tensor([0, 10**9, 0, -5], device=device))
    row = row.where(valid, 10**9)
    assert_exact(read_rows(cache.rows, page, row, valid), expected)


def test_nothing_to_read_or_write(device, rng, fmt):
    cache = make_cache(fmt, 4, [4], rng, device)
    before, none = cache.bytes, torch.empty(0, dtype=torch.int64, device=device)
    write_rows(cache.rows, none, none, torch.empty((0, fmt.dim), device=device))
    padded = torch.full((3,), -1, device=device)
    write_rows(cache.rows, padded, padded, torch.ones((3, fmt.dim), device=device))
    assert torch.equal(cache.bytes, before)
    assert read_rows(cache.rows, none, none, none.bool()).shape == (0, fmt.dim)


def test_a_single_row_is_read_and_written_like_many(device, rng, fmt):
    cache = make_cache(fmt, 3, [3], rng, device)
    values = values_for(fmt, rng, 1)
    page, row = torch.tensor([cache.place(0, 1)], device=device).unbind(1)
    write_rows(cache.rows, page, row, values.to(device))
    assert cache.raw(0, 1) == codecs.encode(values[0].double().tolist(), fmt)
    assert cache.is_poison(0, 0)
    assert cache.is_poison(0, 2)
    actual = read_rows(cache.rows, page, row, torch.tensor([True], device=device))
    assert_exact(actual[0], cache.get(0, 1).float())


def test_rows_of_a_page_beyond_2_31_elements_are_addressed(device):
    # Views of one small page with a huge stride need no memory; only their addresses are computed.
    fmt = RowFormat.plain(8, torch.float32)
    cache = PagedRows(
        torch.zeros(1, 16, device=device), 2, fmt, torch.tensor([[2**30, 2**31 - 1]], dtype=torch.int32, device=device)
    )
    page, row = cache.locate(torch.tensor([0, 0], device=device), torch.tensor([1, 2], device=device))
    assert page.dtype == row.dtype == torch.int64
    assert (page * 2 + row).tolist() == [2**31 + 1, 2**32 - 2]


@pytest.mark.parametrize(
    ("fmt", "data", "scales", "dtype"),
    [
        pytest.param(RowFormat.fp8(512, 64), 448 + 128, 7, torch.uint8, id="flash-row"),
        pytest.param(RowFormat.fp8(128), 128, 2, torch.uint8, id="flash-index-fp8"),
        pytest.param(RowFormat.fp4(128), 64, 4, torch.uint8, id="flash-index-fp4"),
        pytest.param(RowFormat.fp8(48, 8), 40 + 16, 1, torch.uint8, id="short-block"),
        pytest.param(RowFormat.plain(2048, torch.float32), 2048, 0, torch.float32, id="state"),
    ],
)
def test_sizes(fmt, data, scales, dtype):
    assert (fmt.data_size, fmt.num_scales, fmt.row_size, fmt.dtype) == (data, scales, data + scales, dtype)


@pytest.mark.parametrize("dim", [16, 48, 96])
def test_fp4_rows_of_a_size_without_a_transform_are_refused(dim):
    with pytest.raises(ValueError, match=f"index_head_dim.*{dim}"):
        RowFormat.fp4(dim)


def test_poison_is_nan():
    """If it were not, the tests that leave unwritten rows poisoned would prove nothing."""
    assert math.isnan(codecs.e4m3(POISON))
    assert math.isnan(codecs.bf16_value(bytes([POISON, POISON])))
    assert torch.full((4,), POISON, dtype=torch.uint8).view(torch.float32).isnan().all()
