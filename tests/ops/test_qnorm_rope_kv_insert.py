"""The last steps of queries and window rows (docs/model.md, "Attention")."""

import math

import pytest
import torch

from testing.ops.numeric import FUNCTION, U32, U, assert_within, f64, normal
from testing.ops.paging import POISON, make_cache
from vllm_deepseek_v4flash.ops.qnorm_rope_kv_insert import qnorm_rope_kv_insert
from vllm_deepseek_v4flash.ops.rows import RowFormat

DIM, ROPE = 48, 8
INV_FREQ = [1.0, 0.3, 0.05, 0.002]
FORMATS = {
    "fp32": RowFormat.plain(DIM, torch.float32),
    "bf16": RowFormat.plain(DIM, torch.bfloat16),
    "fp8": RowFormat.fp8(DIM, ROPE),
}


def table(positions, device):
    rows = [[f(p * w) for f in (math.cos, math.sin) for w in INV_FREQ] for p in positions]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, ROPE).to(device)


def rotated(row, position):
    """One fp64 row with its last 8 values rotated."""
    row = row.clone()
    for k, w in enumerate(INV_FREQ):
        i = DIM - ROPE + 2 * k
        z = complex(*row[i : i + 2].tolist()) * complex(math.cos(position * w), math.sin(position * w))
        row[i], row[i + 1] = z.real, z.imag
    return row


def pair_size(row):
    """For each value the sum of magnitudes that rotation makes it from."""
    size = row.abs()
    size[-ROPE:] = size[-ROPE:].unflatten(0, (-1, 2)).sum(-1).repeat_interleave(2)
    return size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("heads", [1, 5])
def test_queries_are_normalised_per_head_and_then_rotated(device, rng, dtype, eps, heads):
    positions = [0, 7, 129]
    cache = make_cache(FORMATS["fp32"], 4, [4], rng, device)
    # Heads of very different sizes: a norm over more than one head would show.
    q = normal(rng, 3, heads, DIM, device=device, dtype=dtype) * 4 ** torch.arange(heads, device=device)[:, None]
    q = q.to(dtype)
    kv = normal(rng, 3, DIM, device=device, dtype=dtype)
    slots = torch.tensor([-1, -1, -1], device=device)
    actual = qnorm_rope_kv_insert(q, kv, table(positions, device), cache.rows, slots, eps=eps)
    assert actual.dtype == dtype
    for t, position in enumerate(positions):
        for h in range(heads):
            row = f64(q)[t, h]
            normed = row / math.sqrt(sum(v * v for v in row.tolist()) / DIM + eps)
            # The norm is rounded to the dtype, then rotation rounds again; cos and sin are fp32.
            bound = (U[dtype] * (1 + U[dtype]) + (DIM + 4) * U32 + FUNCTION) * pair_size(normed)
            assert_within(actual[t, h], rotated(normed, position), bound)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_rows_are_rotated_quantised_and_stored_in_their_slots(device, rng, fmt, dtype):
    numbers, positions = [9, 0, 4, 5], [9, 0, 4, 5]
    cache = make_cache(fmt, 4, [11], rng, device)
    kv = normal(rng, 6, DIM, device=device, dtype=dtype, scale=3)
    slots = torch.tensor([-1, *(cache.slot(0, n) for n in numbers), -7], device=device)
    q = normal(rng, 6, 2, DIM, device=device, dtype=dtype)
    before = cache.bytes
    cos_sin = table([3, *positions, 0], device)
    qnorm_rope_kv_insert(q, kv, cos_sin, cache.rows, slots, eps=1e-6)
    touched = torch.zeros(before.shape, dtype=torch.bool)
    for t, number in enumerate(numbers, start=1):
        row = f64(kv)[t]
        expected, size = rotated(row, positions[t - 1]), pair_size(row)
        step = torch.full((DIM,), U[fmt.dtype] if fmt.codec == "plain" else U[torch.bfloat16])
        floor = torch.zeros(DIM)
        if fmt.codec == "e4m3":
            # e4m3 has 4 significant bits, so half a step is 2^-4 of the value, or 2^-10 of the scale below its normals.
            amax = row[: fmt.quantised].abs().max().item()
            scale = 2.0 ** math.ceil(math.log2(amax / 448))
            step[: fmt.quantised], floor[: fmt.quantised] = 2.0**-4, scale * 2.0**-10
        stored = cache.get(0, number)
        bound = (step.double() * (1 + U[dtype]) + U[dtype] + 4 * U32) * size + floor
        assert ((stored - expected).abs() <= bound).all()
        page, offset = cache.place(0, number)
        for span in cache.spans(page, offset):
            touched[page, span] = True
    assert torch.equal(cache.bytes[~touched], before[~touched])


def test_unrotated_kv_values_are_the_codec_of_the_input(device, rng):
    """Position 0 does not rotate, so that every byte is known."""
    fmt = FORMATS["fp8"]
    cache, wanted = (make_cache(fmt, 3, [5], torch.Generator().manual_seed(1), device) for _ in range(2))
    kv = normal(rng, 5, DIM, device=device, dtype=torch.bfloat16)
    wanted.put(0, kv.cpu())
    slots = torch.tensor([cache.slot(0, n) for n in range(5)], device=device)
    qnorm_rope_kv_insert(kv[:, None], kv, table([0] * 5, device), cache.rows, slots, eps=1e-6)
    assert torch.equal(cache.bytes, wanted.bytes)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [3, DIM - 1])
def test_a_row_that_is_not_finite_stays_so(device, rng, fmt, value, at):
    cache = make_cache(fmt, 4, [2], rng, device)
    kv = normal(rng, 2, DIM, device=device)
    kv[0, at] = value
    slots = torch.tensor([cache.slot(0, n) for n in range(2)], device=device)
    q = qnorm_rope_kv_insert(kv[:, None], kv, table([1, 1], device), cache.rows, slots, eps=1e-6)
    assert not cache.get(0, 0)[at].isfinite()
    assert not q[0, 0, at].isfinite()
    for read in cache.get(0, 1), q[1]:
        assert read.isfinite().all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_pages_past_32_bit_offsets_are_written(device, rng, fmt):
    far, near = (
        make_cache(fmt, 3, [8], torch.Generator().manual_seed(1), device, far=far) for far in (True, False)
    )  # the same pages, elsewhere
    kv = normal(rng, 8, DIM, device=device, dtype=torch.bfloat16)
    cos_sin = table(range(8), device)
    for cache in (far, near):
        slots = torch.tensor([cache.slot(0, n) for n in range(8)], device=device)
        qnorm_rope_kv_insert(kv[:, None], kv, cos_sin, cache.rows, slots, eps=1e-6)
    untouched = far.bytes.shape[0] - near.bytes.shape[0] + 1
    assert (far.bytes[:untouched] == POISON).all()
    assert torch.equal(far.bytes[untouched:], near.bytes[1:])
    assert not far.is_poison(0, 7)


def test_no_tokens(device, rng):
    cache = make_cache(FORMATS["fp8"], 4, [4], rng, device)
    before = cache.bytes
    empty = torch.zeros(0, 2, DIM, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert qnorm_rope_kv_insert(empty, empty[:, 0], table([], device), cache.rows, none, eps=1e-6).shape == (0, 2, DIM)
    assert torch.equal(cache.bytes, before)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("kv", (3, DIM - 1), rf"kv must have shape \[3, {DIM}\]"),
        ("kv", (2, DIM), rf"kv must have shape \[3, {DIM}\]"),
        ("slots", (2,), r"slots must have shape \[3\], got \[2\]"),
        ("cos_sin", (2, ROPE), r"cos_sin must have shape \[3, "),
        ("cos_sin", (3, ROPE - 1), f"cannot rotate {ROPE - 1} of {DIM} dimensions"),
        ("cos_sin", (3, DIM + 2), f"cannot rotate {DIM + 2} of {DIM} dimensions"),
    ],
)
def test_wrong_shapes_are_named_and_nothing_is_written(device, rng, name, shape, message):
    cache = make_cache(FORMATS["fp32"], 4, [4], rng, device)
    before = cache.bytes
    arguments = {
        "q": torch.zeros(3, 2, DIM, device=device),
        "kv": torch.zeros(3, DIM, device=device),
        "cos_sin": table([0, 1, 2], device),
        "slots": torch.tensor([cache.slot(0, n) for n in range(3)], device=device),
    }
    arguments[name] = torch.zeros(shape, dtype=arguments[name].dtype, device=device)
    with pytest.raises(ValueError, match=message):
        qnorm_rope_kv_insert(**arguments, window=cache.rows, eps=1e-6)
    assert torch.equal(cache.bytes, before)
