"""What all CPU kernels share: conversions, exp, threads, and where compiled code is kept."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from testing.ops.numeric import assert_exact, normal
from testing.ops.paging import make_cache
from vllm_deepseek_v4flash.ops.cpu import arithmetic, compiling, memory, paged, threads
from vllm_deepseek_v4flash.ops.fused_experts import fused_experts
from vllm_deepseek_v4flash.ops.indexer_topk import indexer_topk
from vllm_deepseek_v4flash.ops.merged_linear import merged_linear
from vllm_deepseek_v4flash.ops.rows import RowFormat
from vllm_deepseek_v4flash.ops.sparse_attention import sparse_attention

CPU = torch.device("cpu")
# Every exponent and sign of fp32, with mantissas at and around the borders of all narrower formats.
PATTERNS = torch.arange(0, 2**32, 2**23, dtype=torch.int64)[:, None] + torch.tensor(
    [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFF, 0x80000, 0x80001, 0x180000]
)
NUMBERS = PATTERNS.flatten().to(torch.uint32).view(torch.float32)


@numba.njit
def _convert(values, dtype, out, back):
    memory.store(out, dtype, back.size, values)
    for i in range(back.size):
        back[i] = memory.rounded(memory.get(values, i), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(dtype):
    out, back = torch.zeros(NUMBERS.shape, dtype=dtype), torch.zeros_like(NUMBERS)
    _convert(NUMBERS.data_ptr(), memory.CODES[dtype], out.data_ptr(), back.numpy())
    assert_exact(out, NUMBERS.to(dtype))
    assert_exact(back, NUMBERS.to(dtype).float())


@numba.njit
def _load(values, dtype, out, count):
    memory.load(values, dtype, count, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read(dtype):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    out = torch.zeros(2**16)
    _load(halves.data_ptr(), memory.CODES[dtype], out.data_ptr(), 2**16)
    assert_exact(out, halves.float())


@numba.njit
def _e4m3(values, codes, numbers):
    for i in range(values.size):
        codes[i] = paged._to_e4m3(values[i])
    for i in range(256):
        numbers[i] = paged._from_e4m3(i)


def test_e4m3_is_that_of_torch():
    finite = NUMBERS[NUMBERS.abs() <= 448]
    codes, numbers = torch.zeros(finite.shape, dtype=torch.uint8), torch.zeros(256)
    _e4m3(finite.numpy(), codes.numpy(), numbers.numpy())
    assert_exact(codes.view(torch.float8_e4m3fn).float(), finite.to(torch.float8_e4m3fn).float())
    assert_exact(numbers, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float())


@numba.njit
def _exp(x, out):
    for i in range(x.size):
        out[i] = arithmetic.exp(x[i])


def test_exp_is_within_two_ulp():
    x = torch.cat((torch.linspace(-87, 88, 100_003), torch.linspace(-1e-6, 1e-6, 1001)))
    out = torch.zeros_like(x)
    _exp(x.numpy(), out.numpy())
    exact = x.double().exp()
    assert ((out.double() - exact).abs() <= 2 * 2.0**-23 * exact).all()
    ends = np.array([np.nan, -np.inf, np.inf, -87.5, 89.0, 0.0], dtype=np.float32)
    found = np.zeros_like(ends)
    _exp(ends, found)
    np.testing.assert_array_equal(found, np.array([np.nan, 0, np.inf, 0, np.inf, 1], dtype=np.float32))


def attention_problem(rng, tokens):
    cache = make_cache(RowFormat.plain(16, torch.float32), 4, [200], rng, CPU)
    cache.put(0, normal(rng, 200, 16))
    q, positions = normal(rng, tokens, 3, 16), torch.arange(200 - tokens, 200)
    return cache, q, positions, torch.zeros(tokens, dtype=torch.int32)


def run_both(cache, q, positions, request):
    attended = sparse_attention(
        q, torch.zeros(3), positions, request, cache.rows, window_size=70, scale=0.3,
        entries=cache.rows, ratio=2, max_entries=100,
    )  # fmt: skip
    chosen = indexer_topk(
        q, torch.ones(len(q), 4), torch.ones(len(q), 3), cache.rows, positions, request,
        ratio=2, topk=30, max_entries=100, scale=1.0,
    )  # fmt: skip
    return attended, chosen


def test_a_row_of_a_product_is_the_same_in_any_batch(rng):
    x, ids = normal(rng, 70, 37), torch.randint(0, 5, (70, 2), generator=rng)
    weights, w13, w2 = torch.rand(70, 2, generator=rng), normal(rng, 5, 26, 37), normal(rng, 5, 37, 13)

    def run(rows):
        routed = fused_experts(x[rows], w13, w2, weights[rows], ids[rows], swiglu_limit=1.0)
        return *merged_linear(x[rows], torch.cat((w13[0], w2[0].T)), [26, 13], [torch.float32] * 2), routed

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(3, 8), slice(60, 70)):
        for alone, among in zip(run(rows), whole, strict=True):
            assert_exact(alone, among[rows])


def test_a_token_is_the_same_in_any_batch_and_any_thread(rng, monkeypatch):
    cache, q, positions, request = attention_problem(rng, 13)
    whole = run_both(cache, q, positions, request)
    for part in (slice(0, 1), slice(3, 8), slice(12, 13)):
        for alone, among in zip(run_both(cache, q[part], positions[part], request[part]), whole, strict=True):
            assert_exact(alone, among[part])
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for shared, single in zip(run_both(cache, q, positions, request), whole, strict=True):
        assert_exact(shared, single)


def test_threads_share_all_items_once(monkeypatch):
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    threads.run(lambda begin, end, room, *args: calls.append((begin, end, args)), 10, 1e9, 5, "x")
    assert sorted(calls) == [(0, 2, ("x",)), (2, 5, ("x",)), (5, 7, ("x",)), (7, 10, ("x",))]
    calls.clear()
    threads.run(lambda begin, end, room: calls.append((begin, end)), 10, threads._WORTH_A_THREAD, 5)
    assert calls == [(0, 10)]


def test_an_error_in_a_thread_is_raised(monkeypatch):
    def fail(begin, end, room):
        if begin:
            raise RuntimeError("out of order")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(RuntimeError, match="out of order"):
        threads.run(fail, 10, 1e9, 5)


def cache_directory(monkeypatch, value):
    monkeypatch.setenv(compiling.CACHE_ENV, str(value))
    compiling.cache_directory.cache_clear()
    try:
        return compiling.cache_directory()
    finally:
        compiling.cache_directory.cache_clear()


def test_the_cache_is_named_after_all_sources(monkeypatch, tmp_path):
    directory = cache_directory(monkeypatch, tmp_path)
    assert directory.parent == tmp_path / "vllm_deepseek_v4flash"
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: original(path) + b"\n" * (path.name == "paged.py"))
    assert cache_directory(monkeypatch, tmp_path) != directory


def test_without_a_place_to_write_kernels_are_compiled_each_time(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    assert cache_directory(monkeypatch, blocked) is None


CODE = """
import sys, torch
from vllm_deepseek_v4flash.ops.cpu.route import route, _route
route(torch.zeros(1, 4), 2, bias=None, expert_ids=None, scaling=1.0)
print(sum(_route.stats.cache_hits.values()), sum(_route.stats.cache_misses.values()))
print(isinstance(sys.modules["llvmlite.binding.ffi"].lib.__dict__, dict))
"""


def test_a_kernel_is_compiled_once_for_many_processes(tmp_path):
    def start():
        environment = os.environ | {compiling.CACHE_ENV: str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
        assert not done.stderr, "Numba warns of kernels that it cannot keep"
        return done.stdout.split()

    assert start() == ["0", "1", "True"]
    assert start() == ["1", "0", "True"]


def test_what_is_not_a_number_ties_with_minus_infinity(rng):
    keys = {"nan": [np.nan, 0.0], "low": [np.inf, 0.0], "one": [-1.0, 0.0]}
    for names, expected in (("nan low low", [0, 1]), ("low nan one", [0, 2]), ("one nan low", [0, 1])):
        cache = make_cache(RowFormat.plain(2, torch.float32), 2, [3], rng, CPU)
        cache.put(0, torch.tensor([keys[name] for name in names.split()]))
        chosen = indexer_topk(
            torch.tensor([[[1.0, 0.0]]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0]]), cache.rows,
            torch.tensor([2]), torch.tensor([0], dtype=torch.int32), ratio=1, topk=2, max_entries=3, scale=1.0,
        )  # fmt: skip
        assert chosen.tolist() == [expected], names


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_rows_that_only_fill_a_tile_take_no_weight(rng, rows):
    """Their products with an infinite query are not numbers."""
    cache = make_cache(RowFormat.plain(4, torch.float32), 4, [rows], rng, CPU)
    cache.put(0, -torch.ones(rows, 4))
    attended = sparse_attention(
        torch.full((1, 1, 4), torch.inf), torch.zeros(1), torch.tensor([rows - 1]), torch.tensor([0]), cache.rows,
        window_size=8, scale=1.0,
    )  # fmt: skip
    assert_exact(attended, torch.zeros(1, 1, 4))
