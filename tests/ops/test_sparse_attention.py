"""Attention over window rows and compressed entries, one token and one head at a time (spec section 3.5)."""

import importlib
import math

import pytest
import torch

from vllm_deepseek_v4flash.ops.rows import RowFormat
from vllm_deepseek_v4flash.ops.sparse_attention import sparse_attention

from .numeric import FUNCTION, U32, assert_within, f64, normal
from .paging import make_cache

DIM = 48
SCALE = 0.3
FORMATS = {
    "fp32": RowFormat.plain(DIM, torch.float32),
    "bf16": RowFormat.plain(DIM, torch.bfloat16),
    "fp8": RowFormat.fp8(DIM, 8),
}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def fmt(request):
    return request.param


class Problem:
    """Requests of `lengths` tokens whose caches are full; tokens to ask are (request, position) pairs."""

    def __init__(self, rng, device, *, fmt=FORMATS["fp32"], lengths, asked, heads=3, ratio=0, dtype=torch.float32):
        self.device, self.ratio, self.asked = device, ratio, asked
        self.q = normal(rng, len(asked), heads, DIM, device=device, dtype=dtype)
        self.sinks = normal(rng, heads, device=device)
        self.window = make_cache(fmt, 4, lengths, rng, device)
        self.window_rows = [self.window.put(r, normal(rng, n, DIM)) for r, n in enumerate(lengths)]
        self.entries = None
        if ratio:
            counts = [n // ratio for n in lengths]
            self.entries = make_cache(fmt, 3, counts, rng, device)
            self.entry_rows = [self.entries.put(r, normal(rng, n, DIM)) for r, n in enumerate(counts)]
            self.max_entries = max(counts)

    def run(self, window_size, indices=None, **change):
        options = {"window_size": window_size, "scale": SCALE}
        if self.entries is not None:
            options |= {"entries": self.entries.rows, "ratio": self.ratio, "max_entries": self.max_entries}
        if isinstance(indices, list):
            indices = torch.tensor(indices, dtype=torch.int32, device=self.device)
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
        return rows

    def check(self, window_size, indices=None):
        actual = self.run(window_size, indices)
        assert actual.dtype == self.q.dtype
        assert actual.shape == self.q.shape
        for t in range(len(self.asked)):
            rows = self.keys(t, window_size, indices)
            for h in range(self.q.shape[1]):
                assert_within(actual[t, h], *attend(f64(self.q)[t, h], rows, self.sinks[h].item()))
        return actual


def attend(q, rows, sink):
    """softmax over the scores and the sink times the rows, and a bound on what fp32 may move it."""
    scores = [(q * k).sum().item() * SCALE for k in rows]
    top = max([*scores, sink])
    if top == -math.inf or sink == math.inf:
        return torch.zeros(DIM, dtype=torch.float64), 0.0
    weights = [math.exp(s - top) for s in scores]
    total = sum(weights) + math.exp(sink - top)
    out = sum((w / total * k for w, k in zip(weights, rows, strict=True)), torch.zeros(DIM, dtype=torch.float64))
    # A score is a sum of DIM products; an error of a score moves every weight relatively by as much, above and below
    # the line. exp of x errs by up to |x| * U32 more where it goes through exp2; the sum over the rows and one quotient
    # follow.
    size = max(((q * k).abs().sum().item() * SCALE for k in rows), default=0.0)
    reach = max((abs(s - top) for s in scores), default=0.0)
    relative = 2 * ((DIM + 2) * U32 * size + reach * U32 + FUNCTION) + (len(rows) + 2) * U32
    largest = torch.stack(rows).abs().amax(0) if rows else torch.zeros(DIM, dtype=torch.float64)
    # The weights sum to what the sink leaves, and no |k| is above the largest.
    return out, relative * (sum(weights) / total) * largest


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
    # One row of score 0 beside a sink of weight 3.
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
    reference = importlib.import_module("vllm_deepseek_v4flash.ops.reference.sparse_attention")
    monkeypatch.setattr(reference, "_WORKSPACE", workspace)
    problem = Problem(rng, torch.device("cpu"), lengths=LENGTHS, asked=ASKED, ratio=4)
    problem.check(7, [[t % 3, 4, -1] for t in range(len(ASKED))] if listed else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks": torch.zeros(4)}, r"sinks must have shape \[3\], got \[4\]"),
        ({"sinks": torch.zeros(3).bfloat16()}, "sinks must be torch.float32"),
        ({"indices": torch.zeros(3, 4, dtype=torch.int32)}, r"indices must have shape \[2, \*\]"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int64)}, "indices must be torch.int32"),
        ({"ratio": 0}, "ratio, got 0"),
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
