"""The indexer's selection (spec section 3.7)."""

import importlib
import itertools

import pytest
import torch

from vllm_deepseek_v4flash.ops.indexer_topk import indexer_topk
from vllm_deepseek_v4flash.ops.rows import RowFormat

from . import codecs
from .numeric import U32, f64, integers, normal
from .paging import make_cache

DIM = 64
FORMATS = {
    "fp32": RowFormat.plain(DIM, torch.float32),
    "bf16": RowFormat.plain(DIM, torch.bfloat16),
    "fp8": RowFormat.fp8(DIM),
    "fp4": RowFormat.fp4(DIM),
}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def fmt(request):
    return request.param


def keys_and_queries(cache, keys, q):
    """The fp64 meaning of the stored keys of each request, and the queries as they meet them."""
    fmt = cache.rows.format
    stored = [cache.put(r, k) for r, k in enumerate(keys)]
    if fmt.codec == "e2m1":
        rows = [codecs.decode(*codecs.encode(row, fmt), fmt) for row in f64(q).flatten(0, 1).tolist()]
        return stored, torch.tensor(rows, dtype=torch.float64).view(q.shape)
    return stored, f64(q)


def scores(stored, q, weights, t, r, s):
    """The score of entry s for token t, and the sum of the magnitudes in it."""
    value = size = 0.0
    for h in range(q.shape[1]):
        dot = (q[t, h] * stored[r][s]).sum().item()
        value += max(dot, 0.0) * weights[t, h].item()
        size += (q[t, h] * stored[r][s]).abs().sum().item() * abs(weights[t, h].item())
    return value, size


def oracle(stored, q, weights, positions, request, *, ratio, topk, max_entries):
    rows = []
    for t, (position, r) in enumerate(zip(positions, request, strict=True)):
        visible = (position + 1) // ratio
        ranked = sorted(range(visible), key=lambda s: (-scores(stored, q, f64(weights), t, r, s)[0], s))
        width = min(topk, max_entries)
        rows.append((ranked + [-1] * width)[:width])
    return torch.tensor(rows, dtype=torch.int32).view(len(positions), -1)


def run(cache, q, weights, positions, request, device, **options):
    to = {"device": device}
    return indexer_topk(
        q, weights, cache.rows, torch.tensor(positions, **to), torch.tensor(request, dtype=torch.int32, **to), **options
    ).cpu()


def exact_problem(fmt, rng, device, lengths, tokens, heads=3):
    """Whole numbers whose scores are exact in fp32 in any order, with many ties, and weights of both signs."""
    cache = make_cache(fmt, 3, lengths, rng, device)
    keys = [integers(rng, -2, 2, n, DIM) for n in lengths]
    q = integers(rng, -2, 2, tokens, heads, DIM, device=device)
    weights = integers(rng, -4, 4, tokens, heads, device=device) / 4
    return cache, keys, q, weights


@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize("topk", [1, 5, 64])
def test_selection_is_exact_where_the_scores_are(device, rng, fmt, ratio, topk):
    lengths = [13, 5, 20]
    request = [0, 0, 1, 1, 1, 2, 2, 2]
    positions = [13 * ratio - 1, 3 * ratio - 1, 0, 5 * ratio - 1, 2 * ratio, 20 * ratio - 2, 20 * ratio - 1, ratio - 1]
    cache, keys, q, weights = exact_problem(fmt, rng, device, lengths, len(positions))
    options = {"ratio": ratio, "topk": topk, "max_entries": 20}
    stored, seen = keys_and_queries(cache, keys, q)
    actual = run(cache, q, weights, positions, request, device, **options)
    expected = oracle(stored, seen, weights, positions, request, **options)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, expected)


def test_real_valued_scores_are_ranked_to_within_their_rounding(device, rng, fmt):
    lengths, request = [40, 17], [0] * 6 + [1] * 3
    positions = [159, 100, 7, 60, 158, 31, 67, 40, 20]
    cache = make_cache(fmt, 5, lengths, rng, device)
    q = normal(rng, 9, 4, DIM, device=device, dtype=torch.bfloat16)
    weights = normal(rng, 9, 4, device=device)
    stored, seen = keys_and_queries(cache, [normal(rng, n, DIM) for n in lengths], q)
    actual = run(cache, q, weights, positions, request, device, ratio=4, topk=8, max_entries=40).tolist()
    for t, (position, r) in enumerate(zip(positions, request, strict=True)):
        visible = (position + 1) // 4
        values, sizes = zip(*(scores(stored, seen, f64(weights), t, r, s) for s in range(visible)), strict=True)
        # A sum of 4 heads of 64 products; with 4 bits the transform of q may flip no code at this seed.
        bound = (DIM + 5) * U32 * max(sizes)
        chosen = [s for s in actual[t] if s >= 0]
        assert actual[t] == chosen + [-1] * (8 - len(chosen))
        assert len(set(chosen)) == len(chosen) == min(8, visible)
        assert all(values[a] >= values[b] - 2 * bound for a, b in itertools.pairwise(chosen))
        others = [values[s] for s in range(visible) if s not in chosen]
        assert not others or values[chosen[-1]] >= max(others) - 2 * bound


def test_equal_scores_go_to_the_smaller_entry(device, rng, fmt):
    cache, _, q, weights = exact_problem(fmt, rng, device, [30], 2)
    row = integers(rng, -2, 2, 1, DIM)
    _stored, _seen = keys_and_queries(cache, [row.expand(30, DIM)], q)
    assert run(cache, q, weights, [119, 50], [0, 0], device, ratio=4, topk=12, max_entries=30).tolist() == [
        list(range(12)), list(range(12)),
    ]  # fmt: skip


def test_zeros_of_either_sign_tie(device, rng):
    # Entry 0's relu is cut and its weight negative: -0 must not lose to entry 1's +0, nor win over entry 2's value.
    fmt = RowFormat.plain(2, torch.float32)
    cache = make_cache(fmt, 2, [3], rng, device)
    cache.put(0, torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, -1.0]]))
    q = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]], device=device)
    for weights, expected in (([-1.0, 1.0], [0, 1, 2]), ([-2.0, 1.0], [0, 1, 2]), ([-1.0, 2.0], [2, 0, 1])):
        actual = run(cache, q, torch.tensor([weights], device=device), [2], [0], device, ratio=1, topk=3, max_entries=3)
        assert actual.tolist() == [expected]


def test_negative_weights_make_negative_scores_that_still_count(device, rng, fmt):
    cache, keys, q, weights = exact_problem(fmt, rng, device, [9], 3)
    weights = -weights.abs() - 1
    stored, seen = keys_and_queries(cache, keys, q)
    options = {"ratio": 2, "topk": 9, "max_entries": 9}
    actual = run(cache, q, weights, [17, 8, 3], [0, 0, 0], device, **options)
    assert torch.equal(actual, oracle(stored, seen, weights, [17, 8, 3], [0, 0, 0], **options))
    assert (actual >= 0).sum(1).tolist() == [9, 4, 2]


@pytest.mark.parametrize("ratio", [4, 128])
def test_an_entry_is_visible_from_the_token_that_completes_it(device, rng, ratio):
    cache, keys, q, weights = exact_problem(FORMATS["fp32"], rng, device, [3], 5)
    keys_and_queries(cache, keys, q)
    positions = [0, ratio - 2, ratio - 1, 2 * ratio - 2, 2 * ratio - 1]
    actual = run(cache, q, weights, positions, [0] * 5, device, ratio=ratio, topk=8, max_entries=2)
    assert [sorted(s for s in row if s >= 0) for row in actual.tolist()] == [[], [], [0], [0], [0, 1]]


def test_entries_that_are_not_visible_are_not_read(device, rng, fmt):
    cache, keys, q, weights = exact_problem(fmt, rng, device, [40], 2)
    stored, seen = keys_and_queries(cache, [keys[0][:4]], q)  # rows 4..39 stay NaN
    options = {"ratio": 4, "topk": 16, "max_entries": 40}
    expected = oracle(stored, seen, weights, [18, 9], [0, 0], **options)
    assert torch.equal(run(cache, q, weights, [18, 9], [0, 0], device, **options), expected)


@pytest.mark.parametrize(("topk", "max_entries", "width"), [(8, 3, 3), (3, 8, 3), (4, 4, 4), (4, 0, 0)])
def test_width_is_the_smaller_of_topk_and_the_entries(device, rng, topk, max_entries, width):
    cache, keys, q, weights = exact_problem(FORMATS["bf16"], rng, device, [8], 2)
    keys_and_queries(cache, keys, q)
    actual = run(cache, q, weights, [2, 0], [0, 0], device, ratio=4, topk=topk, max_entries=max_entries)
    assert actual.tolist() == [[-1] * width] * 2
    assert actual.dtype == torch.int32


def test_no_tokens(device, rng, fmt):
    cache, _, q, weights = exact_problem(fmt, rng, device, [8], 0)
    assert run(cache, q, weights, [], [], device, ratio=4, topk=5, max_entries=8).shape == (0, 5)


def test_four_bit_queries_are_transformed_and_rounded_like_the_keys(device, rng):
    """The rounding of the queries decides here: without it the order would be the other one."""
    fmt = FORMATS["fp4"]
    cache = make_cache(fmt, 2, [2], rng, device)
    # In the transformed domain the query is (6, 2.4, 0, ...), which rounds to (6, 2, 0, ...).
    q = torch.tensor(codecs.sylvester([6.0, 2.4] + [0.0] * 62)).float().view(1, 1, DIM).to(device)
    keys = torch.tensor([codecs.sylvester([1.5, 0.0] + [6.0] * 62), codecs.sylvester([0.0, 4.0] + [6.0] * 62)])
    stored = cache.put(0, keys)
    assert stored[:, :2].tolist() == [[1.5, 0.0], [0.0, 4.0]]
    weights = torch.ones(1, 1, device=device)
    assert 6 * 1.5 < 2.4 * 4
    actual = run(cache, q, weights, [1], [0], device, ratio=1, topk=2, max_entries=2)
    assert actual.tolist() == [[0, 1]]


@pytest.mark.parametrize("workspace", [1, 5000])
def test_reference_in_small_chunks_selects_the_same(monkeypatch, rng, fmt, workspace):
    cpu = torch.device("cpu")
    cache, keys, q, weights = exact_problem(fmt, rng, cpu, [20, 14, 17], 11)
    request, options = [t % 3 for t in range(11)], {"ratio": 4, "topk": 6, "max_entries": 20}
    positions = [4 * len(keys[r]) - 1 - 3 * t for t, r in enumerate(request)]
    stored, seen = keys_and_queries(cache, keys, q)
    reference = importlib.import_module("vllm_deepseek_v4flash.ops.reference.indexer_topk")
    monkeypatch.setattr(reference, "_WORKSPACE", workspace)
    actual = run(cache, q, weights, positions, request, cpu, **options)
    assert torch.equal(actual, oracle(stored, seen, weights, positions, request, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(2, 4)}, r"weights must have shape \[2, 3\], got \[2, 4\]"),
        ({"weights": torch.zeros(2, 3).bfloat16()}, "weights must be torch.float32"),
        ({"q": torch.zeros(2, 3, 32)}, f"queries have 32 dimensions, the cached keys {DIM}"),
        ({"topk": 0}, "topk must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_named(device, rng, change, message):
    cache, _, q, weights = exact_problem(FORMATS["fp8"], rng, device, [8], 2)
    arguments = {"q": q, "weights": weights, "ratio": 4, "topk": 4, "max_entries": 8, **change}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        run(cache, positions=[1, 2], request=[0, 0], device=device, **arguments)
