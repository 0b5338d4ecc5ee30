"""The indexer's selection (docs/model.md, "Indexer")."""

import importlib
import math

import pytest
import torch

from testing.ops import codecs
from testing.ops.numeric import U32, f64, integers, normal
from testing.ops.paging import make_cache
from vllm_deepseek_v4flash.ops.indexer_topk import indexer_topk
from vllm_deepseek_v4flash.ops.rows import PagedRows, RowFormat

DIM, ROPE = 64, 8
PACKAGE = "vllm_deepseek_v4flash.ops"
FORMATS = {
    "fp32": RowFormat.plain(DIM, torch.float32),
    "bf16": RowFormat.plain(DIM, torch.bfloat16),
    "fp8": RowFormat.fp8(DIM),
    "fp4": RowFormat.fp4(DIM),
}


@pytest.fixture(params=list(FORMATS.values()), ids=list(FORMATS))
def fmt(request):
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(request, implementation, monkeypatch):
    """In the interpreter tiles and segments are small, so that few entries and tokens make several."""
    if implementation == "interpreted" and "full_size" not in request.node.name:
        kernel = importlib.import_module(f"{PACKAGE}.triton.indexer_topk")
        monkeypatch.setattr(kernel, "BLOCK_N", 16)
        monkeypatch.setattr(kernel, "BLOCK_T", 4)
        topk = importlib.import_module(f"{PACKAGE}.triton.topk")
        monkeypatch.setattr(topk, "SEGMENT", 32)
        monkeypatch.setattr(topk, "SMALL_SEGMENT", 16)


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
        rows.append((sorted(ranked[:width]) + [-1] * width)[:width])
    return torch.tensor(rows, dtype=torch.int32).view(len(positions), -1)


def unrotated(num_tokens):
    """A table that rotates nothing."""
    return torch.cat((torch.ones(num_tokens, ROPE // 2), torch.zeros(num_tokens, ROPE // 2)), dim=1)


def run(cache, q, weights, positions, request, device, *, cos_sin=None, scale=1.0, **options):
    to = {"device": device}
    cos_sin = unrotated(len(positions)) if cos_sin is None else cos_sin
    return indexer_topk(
        q, cos_sin.to(device), weights, cache.rows, torch.tensor(positions, **to),
        torch.tensor(request, dtype=torch.int32, **to), scale=scale, **options,
    ).cpu()  # fmt: skip


def exact_problem(fmt, rng, device, lengths, tokens, heads=3):
    """Whole numbers whose scores are exact in fp32 in any order, with many ties, and weights of both signs."""
    cache = make_cache(fmt, 3, lengths, rng, device)
    keys = [integers(rng, -2, 2, n, DIM) for n in lengths]
    q = integers(rng, -2, 2, tokens, heads, DIM, device=device)
    weights = integers(rng, -4, 4, tokens, heads, device=device) / 4
    return cache, keys, q, weights


@pytest.mark.parametrize("ratio", [1, 7])
@pytest.mark.parametrize("topk", [1, 5, 64])
def test_selection_is_exact_where_the_scores_are(device, rng, fmt, ratio, topk):
    lengths = [13, 5, 36]
    request = [0, 0, 1, 1, 1, 2, 2, 2]
    positions = [13 * ratio - 1, 3 * ratio - 1, 0, 5 * ratio - 1, 2 * ratio, 36 * ratio - 2, 36 * ratio - 1, ratio - 1]
    cache, keys, q, weights = exact_problem(fmt, rng, device, lengths, len(positions))
    options = {"ratio": ratio, "topk": topk, "max_entries": 36}
    stored, seen = keys_and_queries(cache, keys, q)
    actual = run(cache, q, weights, positions, request, device, **options)
    expected = oracle(stored, seen, weights, positions, request, **options)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_valued_scores_are_ranked_to_within_their_rounding(device, rng, fmt, dtype):
    lengths, request = [40, 17], [0] * 6 + [1] * 3
    positions = [159, 100, 7, 60, 158, 31, 67, 40, 20]
    cache = make_cache(fmt, 5, lengths, rng, device)
    q = normal(rng, 9, 4, DIM, device=device, dtype=dtype)
    weights = normal(rng, 9, 4, device=device, dtype=dtype)
    stored, seen = keys_and_queries(cache, [normal(rng, n, DIM) for n in lengths], q)
    actual = run(cache, q, weights, positions, request, device, ratio=4, topk=8, max_entries=40, scale=0.3).tolist()
    for t, (position, r) in enumerate(zip(positions, request, strict=True)):
        visible = (position + 1) // 4
        values, sizes = zip(*(scores(stored, seen, f64(weights), t, r, s) for s in range(visible)), strict=True)
        # A sum of 4 heads of 64 products, weight times scale; no 4-bit code of q flips at this seed.
        bound = (DIM + 6) * U32 * max(sizes)
        chosen = [s for s in actual[t] if s >= 0]
        assert actual[t] == chosen + [-1] * (8 - len(chosen))
        assert chosen == sorted(set(chosen))
        assert len(chosen) == min(8, visible)
        others = [values[s] for s in range(visible) if s not in chosen]
        assert not others or min(values[s] for s in chosen) >= max(others) - 2 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_dimensions_of_a_query_are_rotated(device, rng, fmt, dtype):
    """A quarter turn takes (a, b) to (-b, a) and half a turn to (-a, -b), both exactly."""
    cache, keys, q, weights = exact_problem(fmt, rng, device, [25], 3)
    q, cos_sin = q.to(dtype), unrotated(3)
    cos_sin[1, 0], cos_sin[1, ROPE // 2] = 0, 1  # the first pair of token 1
    cos_sin[2, ROPE // 2 - 1], cos_sin[2, -1] = -1, 0  # the last pair of token 2
    rotated = q.cpu().clone()
    first = rotated[1, :, DIM - ROPE : DIM - ROPE + 2].clone()
    rotated[1, :, DIM - ROPE], rotated[1, :, DIM - ROPE + 1] = -first[:, 1], first[:, 0]
    rotated[2, :, -2:] *= -1
    stored, seen = keys_and_queries(cache, keys, rotated)
    options = {"ratio": 1, "topk": 12, "max_entries": 25}
    expected = oracle(stored, seen, weights, [24] * 3, [0] * 3, **options)
    actual = run(cache, q, weights, [24] * 3, [0] * 3, device, cos_sin=cos_sin, **options)
    assert torch.equal(actual, expected)
    assert not torch.equal(run(cache, q, weights, [24] * 3, [0] * 3, device, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_queries_are_rounded_to_their_dtype(device, rng, dtype):
    """Rounded, both values of the pair are 1 and the entries tie; unrounded, the second would win."""
    cache = make_cache(RowFormat.plain(2, dtype), 2, [2], rng, device)
    cache.put(0, torch.eye(2))
    q = torch.ones(1, 1, 2, dtype=torch.bfloat16, device=device)
    cos_sin, weights = torch.tensor([[1.0, 2.0**-10]]), torch.ones(1, 1, device=device)
    options = {"cos_sin": cos_sin, "ratio": 1, "topk": 1, "max_entries": 2}
    assert run(cache, q, weights, [1], [0], device, **options).tolist() == [[0]]
    assert run(cache, q.float(), weights, [1], [0], device, **options).tolist() == [[1]]


def test_weights_are_scaled(device, rng, fmt):
    """A factor keeps the order unless it takes everything to zero, where all entries tie."""
    cache, keys, q, weights = exact_problem(fmt, rng, device, [30], 2)
    stored, seen = keys_and_queries(cache, keys, q)
    options = {"ratio": 1, "topk": 6, "max_entries": 30}
    expected = oracle(stored, seen, weights, [29, 20], [0, 0], **options)
    tiny = weights * 2.0**-100
    assert torch.equal(run(cache, q, tiny, [29, 20], [0, 0], device, scale=2.0**90, **options), expected)
    assert expected.tolist() != [list(range(6))] * 2
    assert run(cache, q, tiny, [29, 20], [0, 0], device, scale=2.0**-100, **options).tolist() == [list(range(6))] * 2


def test_strided_inputs(device, rng, fmt):
    cache, keys, q, weights = exact_problem(fmt, rng, device, [25], 6)
    stored, seen = keys_and_queries(cache, keys, q)
    options = {"ratio": 1, "topk": 7, "max_entries": 25}
    positions, request = [24, 20, 10, 5, 23, 19], [0] * 6
    expected = oracle(stored, seen, weights, positions, request, **options)
    wide = torch.full((6, 4, DIM + 3), math.nan, dtype=torch.bfloat16, device=device)
    wide[:, :3, :DIM] = q
    by_head = weights.bfloat16().t().contiguous().t()
    assert torch.equal(run(cache, wide[:, :3, :DIM], by_head, positions, request, device, **options), expected)


def test_pages_past_32_bit_offsets_are_read(device, rng, fmt):
    cache = make_cache(fmt, 3, [20], rng, device, far=True)
    q, weights = integers(rng, -2, 2, 3, 3, DIM, device=device), integers(rng, -4, 4, 3, 3, device=device)
    stored, seen = keys_and_queries(cache, [integers(rng, -2, 2, 20, DIM)], q)
    options = {"ratio": 1, "topk": 5, "max_entries": 20}
    expected = oracle(stored, seen, weights, [19, 7, 12], [0] * 3, **options)
    assert torch.equal(run(cache, q, weights, [19, 7, 12], [0] * 3, device, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 16, 17])
def test_any_number_of_heads(device, rng, dtype, heads):
    cache, keys, q, weights = exact_problem(FORMATS["bf16"], rng, device, [21], 2, heads)
    stored, seen = keys_and_queries(cache, keys, q)
    options = {"ratio": 1, "topk": 4, "max_entries": 21}
    expected = oracle(stored, seen, weights, [20, 17], [0, 0], **options)
    actual = run(cache, q.to(dtype), weights.to(dtype), [20, 17], [0, 0], device, **options)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dim", [48, 128])
def test_dimensions_that_fill_no_block_and_those_of_flash(device, rng, dim):
    fmt = RowFormat.fp8(dim)
    cache = make_cache(fmt, 3, [21], rng, device)
    q, weights = integers(rng, -2, 2, 2, 3, dim, device=device), integers(rng, -4, 4, 2, 3, device=device)
    stored, seen = keys_and_queries(cache, [integers(rng, -2, 2, 21, dim)], q)
    options = {"ratio": 1, "topk": 4, "max_entries": 21}
    expected = oracle(stored, seen, weights, [20, 17], [0, 0], **options)
    assert torch.equal(run(cache, q.bfloat16(), weights, [20, 17], [0, 0], device, **options), expected)


def test_equal_scores_go_to_the_smaller_entry(device, rng, fmt):
    cache, _, q, weights = exact_problem(fmt, rng, device, [30], 2)
    row = integers(rng, -2, 2, 1, DIM)
    _stored, _seen = keys_and_queries(cache, [row.expand(30, DIM)], q)
    assert run(cache, q, weights, [119, 50], [0, 0], device, ratio=4, topk=12, max_entries=30).tolist() == [
        list(range(12)), list(range(12)),
    ]  # fmt: skip


def test_zeros_of_either_sign_tie(device, rng):
    # Where entry 0's relu is cut and its weight negative it scores -0, which must not lose to entry 1's +0.
    fmt = RowFormat.plain(2, torch.float32)
    cache = make_cache(fmt, 2, [3], rng, device)
    cache.put(0, torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, -1.0]]))
    q = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]], device=device)
    cases = [([-1.0, 1.0], 1, [0]), ([-2.0, 1.0], 2, [0, 1]), ([-1.0, 2.0], 1, [2]), ([-1.0, 2.0], 2, [0, 2])]
    for weights, topk, expected in cases:
        given = torch.tensor([weights], device=device)
        options = {"cos_sin": torch.tensor([[1.0, 0.0]]), "ratio": 1, "topk": topk, "max_entries": 3}
        assert run(cache, q, given, [2], [0], device, **options).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_that_is_no_number_ranks_last(device, rng, dtype):
    cache = make_cache(RowFormat.plain(DIM, dtype), 3, [20], rng, device)
    keys = normal(rng, 20, DIM)
    keys[[0, 3, 7, 18]] = math.nan
    cache.put(0, keys)
    q, weights = normal(rng, 2, 3, DIM, device=device, dtype=dtype), normal(rng, 2, 3, device=device)
    actual = run(cache, q, weights, [19, 18], [0, 0], device, ratio=1, topk=16, max_entries=20).tolist()
    numbers = [s for s in range(20) if s not in (0, 3, 7, 18)]
    assert actual == [numbers, [0, *numbers[:-1]]]
    q[1] = math.nan
    actual = run(cache, q, weights, [19, 18], [0, 0], device, ratio=1, topk=6, max_entries=20).tolist()
    assert actual[1] == list(range(6))


def test_negative_weights_make_negative_scores_that_still_count(device, rng, fmt):
    cache, keys, q, weights = exact_problem(fmt, rng, device, [9], 3)
    weights = -weights.abs() - 1
    stored, seen = keys_and_queries(cache, keys, q)
    options = {"ratio": 2, "topk": 5, "max_entries": 9}
    actual = run(cache, q, weights, [17, 13, 8], [0, 0, 0], device, **options)
    assert torch.equal(actual, oracle(stored, seen, weights, [17, 13, 8], [0, 0, 0], **options))
    assert (actual >= 0).sum(1).tolist() == [5, 5, 4]


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
    actual = run(cache, q, weights, [1], [0], device, ratio=1, topk=1, max_entries=2)
    assert actual.tolist() == [[0]]


@pytest.mark.parametrize("workspace", [1, 300, 5000])
def test_small_workspaces_select_the_same(implementation, monkeypatch, device, rng, fmt, workspace):
    """Tokens come in chunks: of one, of several but not all, and with requests that chunks and blocks divide."""
    package = {"reference": "", "cpu": ".cpu"}.get(implementation, ".triton")
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}{package}.indexer_topk"), "_WORKSPACE", workspace)
    cache, keys, q, weights = exact_problem(fmt, rng, device, [20, 14, 17], 11)
    request, options = sorted(t % 3 for t in range(11)), {"ratio": 4, "topk": 6, "max_entries": 20}
    positions = [4 * len(keys[r]) - 1 - 3 * t for t, r in enumerate(request)]
    stored, seen = keys_and_queries(cache, keys, q)
    actual = run(cache, q.bfloat16(), weights, positions, request, device, **options)
    assert torch.equal(actual, oracle(stored, seen, weights, positions, request, **options))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_bound_far_above_what_is_visible(device, rng, fmt, tokens):
    """As in a CUDA graph; the block table is as narrow as the entries allow, so that nothing beyond can be read."""
    cache, keys, q, weights = exact_problem(fmt, rng, device, [20], tokens)
    stored, seen = keys_and_queries(cache, keys, q)
    options = {"ratio": 4, "topk": 6, "max_entries": 1000}
    positions, request = [79, 71, 40][:tokens], [0] * tokens
    expected = oracle(stored, seen, weights, positions, request, **options)
    assert torch.equal(run(cache, q.bfloat16(), weights, positions, request, device, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_any_batch(device, rng, dtype):
    """A token alone, a request by itself and all together choose the same, near ties included."""
    lengths, request, positions = [40, 33], [0, 0, 0, 1, 1], [37, 38, 39, 31, 32]
    cache = make_cache(FORMATS["fp32" if dtype == torch.float32 else "fp8"], 5, lengths, rng, device)
    # Rows that are almost the same, so that rounding alone ranks many of them.
    for r, n in enumerate(lengths):
        cache.put(r, normal(rng, 1, DIM) * (1 + normal(rng, n, DIM) * 2.0**-22))
    q, weights = normal(rng, 5, 3, DIM, device=device, dtype=dtype), normal(rng, 5, 3, device=device)
    options = {"ratio": 1, "topk": 8, "max_entries": 40}
    together = run(cache, q, weights, positions, request, device, **options)
    for parts in ([slice(t, t + 1) for t in range(5)], [slice(0, 2), slice(2, 5)]):
        separate = [run(cache, q[p], weights[p], positions[p], request[p], device, **options) for p in parts]
        assert torch.equal(torch.cat(separate), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_full_size(device, rng, dtype):
    """Three tiles, and blocks of tokens that requests divide, at the sizes that a GPU uses."""
    fmt, lengths = FORMATS["fp32" if dtype == torch.float32 else "fp8"], [300, 130]
    cache, keys, q, weights = exact_problem(fmt, rng, device, lengths, 18)
    request = [0] * 9 + [1] * 9
    positions = [*range(60, 300, 30), 299, *range(113, 130, 2)]
    stored, seen = keys_and_queries(cache, keys, q)
    options = {"ratio": 1, "topk": 64, "max_entries": 300}
    expected = oracle(stored, seen, weights, positions, request, **options)
    assert torch.equal(run(cache, q.to(dtype), weights, positions, request, device, **options), expected)


@pytest.mark.slow
def test_262144_candidates_at_full_size(device, rng):
    """A million tokens; the interpreter scores every entry."""
    entries, dim = 262144, 16
    fmt = RowFormat.plain(dim, torch.bfloat16)
    order = torch.randperm(entries // 64, generator=rng)
    pages = integers(rng, -2, 2, entries // 64, 64 * dim, dtype=torch.bfloat16)
    rows = PagedRows(pages.to(device), 64, fmt, order.int()[None].to(device))
    q = integers(rng, -2, 2, 2, 4, dim, dtype=torch.bfloat16)
    weights = integers(rng, -4, 4, 2, 4)
    keys = pages[order].view(entries, dim).double()
    for t in range(2):
        value = torch.einsum("hd,sd->sh", q[t].double(), keys).relu() @ weights[t].double()
        expected = value.sort(descending=True, stable=True).indices[:512].sort().values
        actual = indexer_topk(
            q[t : t + 1].to(device), unrotated(1).to(device), weights[t : t + 1].to(device), rows,
            torch.tensor([4 * entries - 1], device=device), torch.zeros(1, dtype=torch.int32, device=device),
            ratio=4, topk=512, max_entries=entries, scale=1.0,
        )  # fmt: skip
        assert torch.equal(actual.cpu(), expected[None].int())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(2, 4)}, r"weights must have shape \[2, 3\], got \[2, 4\]"),
        ({"cos_sin": torch.zeros(1, ROPE)}, r"cos_sin must have shape \[2, \*\], got \[1, 8\]"),
        ({"cos_sin": torch.zeros(2, 7)}, "cannot rotate 7 of 64 dimensions"),
        ({"cos_sin": torch.zeros(2, 66)}, "cannot rotate 66 of 64 dimensions"),
        ({"cos_sin": torch.zeros(2, 0)}, "cannot rotate 0 of 64 dimensions: need an even number of at least 2"),
        ({"cos_sin": torch.zeros(2, ROPE).bfloat16()}, "cos_sin must be torch.float32, got torch.bfloat16"),
        ({"positions": [1]}, r"positions must have shape \[2\], got \[1\]"),
        ({"request": [0, 0, 0]}, r"request must have shape \[2\], got \[3\]"),
        ({"q": torch.zeros(2, 3, 32)}, f"queries have 32 dimensions, the cached keys {DIM}"),
        ({"topk": 0}, "topk must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_named(device, rng, change, message):
    cache, _, q, weights = exact_problem(FORMATS["fp8"], rng, device, [8], 2)
    arguments = {"q": q, "weights": weights, "positions": [1, 2], "request": [0, 0], "cos_sin": unrotated(2)}
    arguments |= {"ratio": 4, "topk": 4, "max_entries": 8, **change}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        run(cache, device=device, **arguments)
