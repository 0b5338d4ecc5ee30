"""Attention over window rows and compressed entries, one token and one head at a time (docs/model.md, "Attention")."""

import contextlib
import importlib
import math

import pytest
import torch

from testing.ops.attention import attend
from testing.ops.numeric import FUNCTION, U32, assert_exact, assert_within, f64, normal
from testing.ops.paging import make_cache
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.rows import RowFormat, read_rows, write_rows
from vllm_deepseek_v4flash.ops.sparse_attention import sparse_attention
from vllm_deepseek_v4flash.ops.triton.launch import Device

DIM = 48
SCALE = 0.3
FORMATS = {
    "fp32": RowFormat.plain(DIM, torch.float32),
    "bf16": RowFormat.plain(DIM, torch.bfloat16),
    "fp16": RowFormat.plain(DIM, torch.float16),
    "fp8": RowFormat.fp8(DIM, 8),
}


@pytest.fixture(params=[FORMATS[name] for name in ("fp32", "bf16", "fp8")], ids=["fp32", "bf16", "fp8"])
def fmt(request):
    return request.param


class Problem:
    """Requests of `lengths` tokens whose caches are full; tokens to ask are (request, position) pairs."""

    def __init__(
        self, rng, device, *, fmt=FORMATS["fp32"], lengths, asked, heads=3, ratio=0, dtype=torch.float32, far=False
    ):
        self.device, self.ratio, self.asked = device, ratio, asked
        self.angles = None
        self.q = normal(rng, len(asked), heads, DIM, device=device, dtype=dtype)
        self.sinks = normal(rng, heads, device=device)
        self.window = make_cache(fmt, 4, lengths, rng, device, far=far)
        self.window_rows = [self.window.put(r, normal(rng, n, DIM)) for r, n in enumerate(lengths)]
        self.entries = None
        if ratio:
            counts = [n // ratio for n in lengths]
            self.entries = make_cache(fmt, 3, counts, rng, device, far=far)
            self.entry_rows = [self.entries.put(r, normal(rng, n, DIM)) for r, n in enumerate(counts)]
            self.max_entries = max(counts)

    def run(self, window_size, indices=None, **change):
        options = {"window_size": window_size, "scale": SCALE}
        if self.entries is not None:
            options |= {"entries": self.entries.rows, "ratio": self.ratio, "max_entries": self.max_entries}
        if self.angles is not None:
            options["cos_sin"] = torch.cat((self.angles.cos(), self.angles.sin()), dim=1).float().to(self.device)
        if isinstance(indices, list):
            indices = torch.tensor(indices, dtype=torch.int32, device=self.device).reshape(len(self.asked), -1)
        return sparse_attention(
            self.q,
            self.sinks,
            torch.tensor([p for _, p in self.asked], dtype=torch.int64, device=self.device),
            torch.tensor([r for r, _ in self.asked], dtype=torch.int32, device=self.device),
            self.window.rows,
            **options | {"indices": indices} | change,
        )

    def keys(self, t, window_size, indices=None):
        """The rows that token t attends to, by the documented rules."""
        r, position = self.asked[t]
        rows = [self.window_rows[r][s] for s in range(max(0, position - window_size + 1), position + 1)]
        if self.entries is not None:
            visible = (position + 1) // self.ratio
            listed = range(visible) if indices is None else indices[t]
            rows += [self.entry_rows[r][s] for s in listed if 0 <= s < visible]
        return torch.stack([torch.zeros(DIM, dtype=torch.float64), *rows])[1:]

    def check(self, window_size, indices=None, **change):
        actual = self.run(window_size, indices, **change)
        assert actual.dtype == self.q.dtype
        assert actual.shape == self.q.shape
        for t in range(len(self.asked)):
            rows = self.keys(t, window_size, indices)
            out, bound = attend(f64(self.q)[t], rows, f64(self.sinks), SCALE, self.weights_dtype)
            if self.angles is not None:
                # Each value is a sum of two products with a rounded cosine and sine.
                bound = pair_size(bound) + 4 * U32 * pair_size(out.abs() + bound)
                out = rotated_back(out, self.angles[t])
            assert_within(actual[t], out, bound)
        return actual

    @property
    def weights_dtype(self):
        """What kernels round the weights to: the dtype in which they multiply."""
        if dispatch.backends(self.device.type)[0] != "triton":
            return torch.float32
        fmt = self.window.rows.format
        return torch.promote_types(self.q.dtype, fmt.dtype) if fmt.codec == "plain" else self.q.dtype


def rotated_back(out, angles):
    """[heads, DIM] fp64 with its last 2 * len(angles) values rotated by minus the angles."""
    out = out.clone()
    pairs = torch.view_as_complex(out[:, DIM - 2 * len(angles) :].unflatten(1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), -angles)
    out[:, DIM - 2 * len(angles) :] = torch.view_as_real(turned).flatten(1)
    return out


def pair_size(size):
    """The magnitudes [heads, DIM] of which a rotation of every pair makes each value."""
    return size.unflatten(1, (-1, 2)).sum(-1).repeat_interleave(2, dim=1)


ASKED = [(1, 8), (0, 0), (0, 21), (0, 22), (2, 3), (2, 40), (1, 0), (0, 5)]
LENGTHS = [23, 9, 41]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_window_alone(device, rng, fmt, dtype, heads):
    Problem(rng, device, fmt=fmt, lengths=LENGTHS, asked=ASKED, heads=heads, dtype=dtype).check(7)


@pytest.mark.parametrize("window_size", [1, 2, 8, 64])
def test_window_holds_the_token_itself_and_no_more_than_its_size(device, rng, window_size):
    asked = [(0, p) for p in (0, window_size - 2, window_size - 1, window_size, 70) if 0 <= p <= 70]
    Problem(rng, device, lengths=[71], asked=asked).check(window_size)


def test_rows_outside_the_window_are_not_read(device, rng, fmt):
    problem = Problem(rng, device, fmt=fmt, lengths=[20], asked=[(0, 12), (0, 9)])
    for row in (*range(6), *range(13, 20)):  # the oldest row in reach is 9 - 3
        problem.window.poison(0, row)
    problem.check(4)


def test_unwritten_rows_before_the_first_token_are_not_read(device, rng, fmt):
    problem = Problem(rng, device, fmt=fmt, lengths=[3], asked=[(0, 0), (0, 1), (0, 2)])
    problem.check(128)


@pytest.mark.parametrize("ratio", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_visible_entry_without_indices(device, rng, fmt, ratio, dtype):
    Problem(rng, device, fmt=fmt, lengths=LENGTHS, asked=ASKED, ratio=ratio, dtype=dtype).check(7)


def test_an_entry_is_visible_from_the_token_that_completes_it(device, rng):
    problem = Problem(rng, device, lengths=[300], asked=[(0, p) for p in (126, 127, 128, 254, 255, 256)], ratio=128)
    problem.check(5)
    assert [len(problem.keys(t, 5)) - 5 for t in range(6)] == [0, 1, 1, 1, 2, 2]


def test_entries_that_are_not_visible_are_not_read(device, rng, fmt):
    problem = Problem(rng, device, fmt=fmt, lengths=[40], asked=[(0, 10), (0, 22)], ratio=4)
    assert problem.entries is not None
    for row in range(5, 10):
        problem.entries.poison(0, row)
    problem.check(3)
    problem.check(3, [[0, 1, 5, 9], [9, 4, 7, 2]])


def test_indices_choose_entries(device, rng, fmt):
    problem = Problem(rng, device, fmt=fmt, lengths=LENGTHS, asked=ASKED, ratio=4)
    generator = torch.Generator().manual_seed(3)
    problem.check(7, [torch.randperm(10, generator=generator)[:6].tolist() for _ in ASKED])


@pytest.mark.parametrize(
    "indices",
    [
        pytest.param([-1, -1, -1, -1], id="none"),
        pytest.param([2, -1, 0, -1], id="gaps"),
        pytest.param([5, 4, 6, 2**31 - 1], id="not-yet-visible-or-never"),
        pytest.param([-(2**31), 3, -7, 1], id="below"),
        pytest.param([1, 3, 1, 1], id="listed-thrice"),
        pytest.param([], id="no-column"),
    ],
)
def test_indices_that_name_nothing_are_ignored_and_repeated_ones_repeat(device, rng, indices):
    # At position 20 five entries are visible: 0..4.
    problem = Problem(rng, device, lengths=[41], asked=[(0, 20), (0, 0)], ratio=4)
    problem.check(3, [indices, indices])


def test_order_of_the_indices_does_not_matter(device, rng):
    problem = Problem(rng, device, lengths=[41], asked=[(0, 40)], ratio=4)
    listed = [8, 1, 3, 0, 9]
    problem.check(3, [listed])
    problem.check(3, [sorted(listed)])


def test_more_entries_than_needed_may_be_announced(device, rng, fmt):
    problem = Problem(rng, device, fmt=fmt, lengths=[9], asked=[(0, 8), (0, 2)], ratio=4)
    problem.max_entries = 50
    problem.check(3)


@pytest.mark.parametrize("sink", [-math.inf, math.inf, 1e4, -1e4, 3e38, -3e38, 0.0])
@pytest.mark.parametrize("ratio", [0, 4])
def test_extreme_sinks(device, rng, sink, ratio):
    problem = Problem(rng, device, lengths=[20], asked=[(0, 19), (0, 0)], ratio=ratio)
    problem.sinks[1] = sink
    actual = problem.check(6)
    if sink >= 1e4:
        assert not actual[:, 1].any()


def test_sink_is_neither_scaled_nor_a_value(device, rng):
    problem = Problem(rng, device, lengths=[1], asked=[(0, 0)], heads=1)
    problem.q.zero_()
    problem.sinks.fill_(math.log(3.0))
    # One row of score 0 and a sink of weight 3.
    assert_within(problem.run(4)[0, 0], problem.window_rows[0][0] / 4, 2 * FUNCTION)


@pytest.mark.parametrize("size", [30.0, 1e3])
def test_large_scores_neither_overflow_nor_vanish(device, rng, size):
    problem = Problem(rng, device, lengths=[20], asked=[(0, 19), (0, 3)], ratio=4)
    problem.q *= size
    assert problem.check(6).isfinite().all()
    problem.sinks.fill_(-math.inf)
    assert problem.check(6).any(-1).all()


def test_nothing_to_attend_to_gives_zeros(device, rng):
    # A padded token at position -1 has an empty window and no entry; no sink either leaves 0 / 0.
    problem = Problem(rng, device, lengths=[8], asked=[(0, -1), (0, 4)], ratio=4)
    problem.sinks[0] = -math.inf
    assert not problem.check(4)[0].any()


@pytest.mark.parametrize(
    ("value", "where", "row"),
    [
        (math.nan, "query", 0),
        (math.nan, "window", 34),
        (math.inf, "window", 70),
        (math.nan, "entries", 16),
        (-math.inf, "entries", 0),
    ],
)
def test_a_nan_goes_through(device, rng, fmt, value, where, row):
    """What sees a NaN or an infinity is not finite; what does not is what it was."""
    problem = Problem(rng, device, fmt=fmt, lengths=[71, 9], asked=[(0, 70), (1, 8)], ratio=4)
    lists = [list(range(17)), list(range(2)) + [-1] * 15] if row % 4 == 0 else None
    whole = problem.run(37, lists)
    if where == "query":
        problem.q[0, :, 5] = value
    else:
        assert problem.entries is not None
        cache = problem.window.rows if where == "window" else problem.entries.rows
        page, place = cache.locate(torch.tensor([0], device=device), torch.tensor([row], device=device))
        values = torch.ones(1, DIM, device=device)
        values[0, 5] = value
        write_rows(cache, page, place, values)
    actual = problem.run(37, lists)
    if math.isnan(value):
        assert actual[0].isnan().all()
    else:
        assert not actual[0].isfinite().all(-1).any()
    assert_exact(actual[1], whole[1])


def test_a_nan_goes_through_many_programs(device, rng):
    """Where a token's keys are divided, the sums of a part whose scores are all NaN are merged with the others."""
    problem = Problem(rng, device, lengths=[151], asked=[(0, 150)], heads=5, ratio=4)
    problem.max_entries = 8192
    problem.q[0, 1, 3] = math.nan
    actual = problem.run(100)[0]
    assert actual[1].isnan().all()
    assert actual[[0, 2, 3, 4]].isfinite().all()


def test_a_nan_sink_goes_through(device, rng):
    problem = Problem(rng, device, lengths=[8], asked=[(0, 4)], ratio=4)
    problem.sinks[1] = math.nan
    actual = problem.run(4)[0]
    assert actual[1].isnan().all()
    assert actual[[0, 2]].isfinite().all()


def test_no_tokens(device, rng):
    for ratio in (0, 4):
        assert Problem(rng, device, lengths=[8], asked=[], ratio=ratio).run(4).shape == (0, 3, DIM)


def test_no_entry_yet(device, rng):
    problem = Problem(rng, device, lengths=[3], asked=[(0, 2)], ratio=4)
    assert problem.max_entries == 0
    problem.check(4)


def test_queries_may_be_strided(device, rng):
    problem = Problem(rng, device, lengths=[12], asked=[(0, 11), (0, 4)])
    wide = torch.full((2, 5, DIM + 16), torch.nan, device=device)
    wide[:, 1:4, 16:] = problem.q
    problem.q = wide[:, 1:4, 16:]
    problem.check(5)


@pytest.mark.parametrize("workspace", [1, 3000])
@pytest.mark.parametrize("listed", [True, False])
def test_reference_in_small_chunks_is_the_same(monkeypatch, rng, workspace, listed):
    reference = importlib.import_module("vllm_deepseek_v4flash.ops.sparse_attention")
    monkeypatch.setattr(reference, "_WORKSPACE", workspace)
    problem = Problem(rng, torch.device("cpu"), lengths=LENGTHS, asked=ASKED, ratio=4)
    problem.check(7, [[t % 3, 4, -1] for t in range(len(ASKED))] if listed else None)


@pytest.mark.parametrize("heads", [16, 33])
def test_more_heads_than_one_program_takes(device, rng, fmt, heads):
    Problem(rng, device, fmt=fmt, lengths=[40], asked=[(0, 39), (0, 8)], heads=heads, dtype=torch.bfloat16).check(7)


@pytest.mark.parametrize("fmt", [FORMATS["fp16"], FORMATS["bf16"]], ids=["fp16", "bf16"])
def test_fp16_queries(device, rng, fmt):
    Problem(rng, device, fmt=fmt, lengths=LENGTHS, asked=ASKED, ratio=4, dtype=torch.float16).check(7)


# Consecutive tokens, requests that change within a block of tokens, and a request that returns; padding comes last.
PREFILL = [(1, 7), (1, 8), (0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (2, 69), (2, 70), (1, 6), (1, 0), (1, 0)]
DECODE = [(2, 70), (0, 4), (1, 8)]
ONE = [(2, 70)]


@pytest.mark.parametrize("asked", [PREFILL, DECODE, ONE], ids=["prefill", "decode", "one"])
@pytest.mark.parametrize("listed", [None, False, True], ids=["window", "all", "listed"])
def test_requests_whose_later_rows_are_unwritten(device, rng, fmt, asked, listed):
    """Several tiles of keys, and no row is there that none of the tokens sees."""
    lengths = [1 + max((p for r, p in asked if r == request), default=-1) for request in range(3)]
    ratio, dtype = 0 if listed is None else 4, torch.float32 if fmt.dtype == torch.float32 else torch.bfloat16
    problem = Problem(rng, device, fmt=fmt, lengths=lengths, asked=asked, ratio=ratio, dtype=dtype)
    lists = [[*range(0, 18, 1 + t % 3), *[-1] * 18, 3, 99][:22] for t in range(len(asked))] if listed else None
    problem.check(37, lists)


@pytest.mark.parametrize("asked", [PREFILL, DECODE, ONE], ids=["prefill", "decode", "one"])
@pytest.mark.parametrize(("fmt", "rope"), [("fp32", 8), ("bf16", 48), ("fp8", 8), ("fp8", 4), ("fp8", 16)])
def test_result_is_rotated_back(device, rng, asked, fmt, rope):
    problem = Problem(rng, device, fmt=FORMATS[fmt], lengths=[5, 9, 71], asked=asked, ratio=4, dtype=torch.bfloat16)
    problem.angles = torch.rand(len(asked), rope // 2, generator=rng, dtype=torch.float64) * 100
    problem.check(37)


@pytest.mark.parametrize("asked", [PREFILL, DECODE, ONE], ids=["prefill", "decode", "one"])
def test_far_more_entries_announced_than_there_are(device, rng, fmt, asked):
    problem = Problem(rng, device, fmt=fmt, lengths=[5, 9, 71], asked=asked, ratio=4)
    problem.max_entries = 8192
    problem.check(20)


@pytest.mark.parametrize("position", [-1, 0, 150])
def test_one_token_with_extreme_sinks_and_keys_for_many_programs(device, rng, position):
    problem = Problem(rng, device, lengths=[151], asked=[(0, position)], heads=5, ratio=4)
    problem.max_entries = 8192
    problem.sinks.copy_(torch.tensor([-math.inf, math.inf, 1e4, -1e4, 0.0]))
    actual = problem.check(100)
    assert actual.isfinite().all()
    assert not actual[:, 1:3].any()


def test_a_list_that_is_part_of_a_wider_one(device, rng):
    problem = Problem(rng, device, lengths=[41], asked=[(0, 40), (0, 20)], ratio=4)
    lists = [[8, 1, 3], [0, 2, 9]]
    wide = torch.full((2, 9), 1, dtype=torch.int32, device=device)
    wide[:, 2:5] = torch.tensor(lists)
    problem.check(3, lists)
    assert_exact(problem.run(3, wide[:, 2:5]), problem.run(3, lists))


@pytest.mark.parametrize("listed", [False, True])
def test_rows_past_the_reach_of_32_bit_offsets(device, rng, fmt, listed):
    problem = Problem(rng, device, fmt=fmt, lengths=[9], asked=[(0, 8)], ratio=4, far=True)
    problem.check(4, [[1, 0]] if listed else None)


def test_a_token_does_not_depend_on_the_others(implementation, device, rng, fmt, monkeypatch):
    """Whole and in chunks that cut the blocks of tokens elsewhere, bit for bit."""
    if implementation in ("interpreted", "cuda"):
        kernels = importlib.import_module("vllm_deepseek_v4flash.ops.triton.sparse_attention")
        monkeypatch.setattr(kernels, "_MOST_SPLITS", 1)
    elif implementation == "reference":
        pytest.skip("PyTorch chooses the order of its sums by the shapes")
    asked = [(0, p) for p in range(50, 64)]
    problem = Problem(rng, device, fmt=fmt, lengths=[64], asked=asked, heads=8, ratio=4, dtype=torch.bfloat16)
    whole, q = problem.check(20), problem.q
    for part in (slice(0, 3), slice(3, 14)):
        problem.q, problem.asked = q[part], asked[part]
        # The interpreter multiplies with BLAS, which orders a sum by the operands' shapes, a row's place in them and
        # the processor. `check` bounds the error of sums in any order: two orders differ by at most twice its bound.
        actual = problem.check(20)
        if implementation != "interpreted":
            assert_exact(actual, whole[part])


@pytest.mark.parametrize(
    ("rows", "kind", "asked"),
    [("fp8", "CSA", [3, 700]), ("bf16", "CSA", [3, 700]), ("fp8", "HCA", list(range(640, 646)))],
    ids=["fp8-CSA-decode", "bf16-CSA-decode", "fp8-HCA-prefill"],
)
def test_dimensions_of_flash(device, rng, rows, kind, asked):
    """8 heads of 512, 128 window rows, 512 of the entries or all, against fp64 over the cache's dequantised rows."""
    dim, ratio = 512, {"CSA": 1, "HCA": 8}[kind]
    fmt = RowFormat.fp8(dim, 64) if rows == "fp8" else RowFormat.plain(dim, torch.bfloat16)
    requests = list(range(len(asked))) if asked[0] == 3 else [0] * len(asked)
    lengths = [1 + max(p for r, p in zip(requests, asked, strict=True) if r == n) for n in range(max(requests) + 1)]
    caches = []
    for count, page in ((lengths, 64), ([n // ratio for n in lengths], 16)):
        caches.append(make_cache(fmt, page, count, rng, device).rows)
        for request, number in enumerate(count):
            at = caches[-1].locate(torch.tensor(request, device=device), torch.arange(number, device=device))
            write_rows(caches[-1], *at, normal(rng, number, dim, device=device))
    q, sinks = normal(rng, len(asked), 8, dim, device=device, dtype=torch.bfloat16), normal(rng, 8, device=device)
    options = {"window_size": 128, "scale": dim**-0.5, "entries": caches[1], "ratio": ratio}
    options["max_entries"] = max(lengths) // ratio
    lists = [torch.randperm(max(lengths), generator=rng)[:512] for _ in asked]
    if kind == "CSA":
        options["indices"] = torch.stack(lists).to(device, torch.int32)
    positions, request_of = (torch.tensor(values, device=device) for values in (asked, requests))
    actual = sparse_attention(q, sinks, positions, request_of, caches[0], **options)
    rounded = torch.bfloat16 if dispatch.backends(device.type)[0] == "triton" else torch.float32
    for t, (request, position) in enumerate(zip(requests, asked, strict=True)):
        visible = (position + 1) // ratio
        chosen = (torch.arange(max(0, position - 127), position + 1), torch.arange(visible))
        if kind == "CSA":
            chosen = (chosen[0], lists[t][lists[t] < visible])
        keys = [
            read_rows(cache, *cache.locate(torch.tensor(request), n.to(device)), torch.ones(len(n), dtype=torch.bool))
            for cache, n in zip(caches, chosen, strict=True)
        ]
        assert_within(actual[t], *attend(f64(q[t]), f64(torch.cat(keys)), f64(sinks), dim**-0.5, rounded))


def test_e4m3_instructions_read_what_bit_arithmetic_reads(implementation, device, rng, monkeypatch):
    if implementation != "interpreted":
        pytest.skip("a GPU has one of the two, PyTorch and Numba neither")
    problem = Problem(rng, device, fmt=FORMATS["fp8"], lengths=[41], asked=[(0, 40)], ratio=4, dtype=torch.bfloat16)
    expected = problem.check(7)
    kernels = importlib.import_module("vllm_deepseek_v4flash.ops.triton.sparse_attention")
    monkeypatch.setattr(kernels, "device_of", lambda tensor: Device(4, native_fp8=True, shared_kb=100))
    assert_exact(problem.run(7), expected)


def test_fp8_rows_that_are_no_words(implementation, device, rng):
    fmt = RowFormat.fp8(DIM, 6)
    window = make_cache(fmt, 4, [9], rng, device).rows
    write_rows(window, *window.locate(torch.tensor(0), torch.arange(9)), normal(rng, 9, DIM, device=device))
    q, sinks = normal(rng, 1, 2, DIM, device=device), torch.zeros(2, device=device)
    where = torch.tensor([8], device=device), torch.tensor([0], device=device)
    refused = pytest.raises(ValueError, match="multiples of 8 bytes, got 42 bytes of codes in rows of 54")
    with refused if implementation in ("interpreted", "cuda") else contextlib.nullcontext():
        assert sparse_attention(q, sinks, *where, window, window_size=4, scale=SCALE).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks": torch.zeros(4)}, r"sinks must have shape \[3\], got \[4\]"),
        ({"sinks": torch.zeros(3).bfloat16()}, "sinks must be torch.float32"),
        ({"indices": torch.zeros(3, 4, dtype=torch.int32)}, r"indices must have shape \[2, \*\]"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int64)}, "indices must be torch.int32"),
        ({"ratio": 0}, "ratio, got 0"),
        ({"cos_sin": torch.zeros(2, DIM + 2)}, f"cannot rotate {DIM + 2} of {DIM} dimensions"),
        ({"cos_sin": torch.zeros(2, 4).half()}, "cos_sin must be torch.float32"),
        ({"q": torch.zeros(2, 3, DIM - 8)}, f"window rows have {DIM} values, the queries {DIM - 8}"),
    ],
)
def test_wrong_arguments_are_named(device, rng, change, message):
    problem = Problem(rng, device, lengths=[8], asked=[(0, 1), (0, 2)], ratio=4)
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    for name in ("q", "sinks"):
        setattr(problem, name, change.pop(name, getattr(problem, name)))
    with pytest.raises(ValueError, match=message):
        problem.run(4, **change)


def test_entries_of_another_width_are_named(device, rng):
    problem = Problem(rng, device, lengths=[8], asked=[(0, 1)], ratio=4)
    entries = make_cache(RowFormat.plain(DIM + 1, torch.float32), 2, [2], rng, device)
    with pytest.raises(ValueError, match=f"entries rows have {DIM + 1} values, the queries {DIM}"):
        problem.run(4, entries=entries.rows)


def test_entries_in_another_format_are_named(device, rng):
    problem = Problem(rng, device, lengths=[8], asked=[(0, 1)], ratio=4)
    entries = make_cache(FORMATS["fp8"], 2, [2], rng, device)
    with pytest.raises(ValueError, match=r"must have the same format, got .*codec='plain'.* and .*codec='e4m3'"):
        problem.run(4, entries=entries.rows)
