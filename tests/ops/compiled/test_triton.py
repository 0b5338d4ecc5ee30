"""Triton kernels at the tiles of DeepSeek-V4-Flash's shapes, in bf16."""

import pytest
import torch

from testing.ops.mhc import OPTIONS, check_entered, entering
from testing.ops.numeric import FUNCTION, U32, assert_within, f64, integers, normal
from testing.ops.packed_weights import check_experts, dense, experts_in_fp64, random_weight, scheme_of, stacked
from testing.ops.paging import make_cache
from testing.ptxrun.verify import SCHEDULES, verified
from vllm_deepseek_v4flash.ops.rows import RowFormat
from vllm_deepseek_v4flash.ops.triton.indexer_topk import indexer_topk
from vllm_deepseek_v4flash.ops.triton.mhc_pre import mhc_pre
from vllm_deepseek_v4flash.ops.triton.packed_experts import packed_experts
from vllm_deepseek_v4flash.ops.triton.rms_norm import rms_norm
from vllm_deepseek_v4flash.ops.triton.route import route
from vllm_deepseek_v4flash.ops.triton.sparse_attention import sparse_attention

from ..test_sparse_attention import attend

BF16 = torch.bfloat16
HIDDEN, HEADS, DIM, ROPE, WINDOW = 4096, 64, 512, 64, 128


@pytest.mark.parametrize("width", [512, 1024, 4096])
def test_rms_norm(execute, rng, width):
    x, weight = normal(rng, 9, width, dtype=BF16), normal(rng, width, dtype=BF16)
    actual, _ = verified(lambda: rms_norm(x, weight, 1e-6), execute)
    expected = f64(x) * (f64(x).square().mean(-1, keepdim=True) + 1e-6).rsqrt() * f64(weight)
    assert_within(actual, expected, (width * U32 + FUNCTION) * expected.abs())


def test_route(execute, rng):
    logits, bias, topk = normal(rng, 9, 256, scale=3), normal(rng, 256), 6
    (weights, ids), _ = verified(lambda: route(logits, topk, bias=bias, expert_ids=None, scaling=1.5), execute)
    scores = torch.nn.functional.softplus(f64(logits)).sqrt()
    expected_ids = (scores + f64(bias)).argsort(dim=1, descending=True, stable=True)[:, :topk]
    assert torch.equal(ids.long(), expected_ids)
    expected = scores.gather(1, expected_ids)
    expected = expected / expected.sum(1, keepdim=True) * 1.5
    assert_within(weights, expected, (3 * FUNCTION + (topk + f64(logits).abs().max()) * U32) * expected)


def test_mhc_pre(execute, rng, device):
    arguments = entering(rng, device, tokens=3, n=4, hidden=HIDDEN, dtype=BF16, norm=True)
    actual, _ = verified(lambda: mhc_pre(*arguments, **OPTIONS), execute)
    check_entered(actual, *arguments, **OPTIONS)


def test_sparse_attention_decoding_an_hca_layer_over_fp8_rows(execute, rng, device):
    """One token at position 8191: 128 window rows and 64 entries of 128 tokens each, 64 heads."""
    fmt, position, ratio = RowFormat.fp8(DIM, ROPE), 8191, 128
    q, sinks = normal(rng, 1, HEADS, DIM, dtype=BF16), normal(rng, HEADS)
    entries = make_cache(fmt, 2, [(position + 1) // ratio], rng, device)
    entry_rows = entries.put(0, normal(rng, (position + 1) // ratio, DIM))
    # The last rows alone are read, so the pages before them may be the same one.
    window = make_cache(fmt, 64, [WINDOW], rng, device)
    window_rows = window.put(0, normal(rng, WINDOW, DIM))
    first = (position + 1 - WINDOW) // 64
    table = torch.zeros((1, first + 3), dtype=torch.int32)
    table[:, first:] = window.rows.block_table
    object.__setattr__(window.rows, "block_table", table)

    def compute():
        return sparse_attention(
            q, sinks, torch.tensor([position]), torch.tensor([0], dtype=torch.int32), window.rows,
            window_size=WINDOW, scale=DIM**-0.5, entries=entries.rows, ratio=ratio, max_entries=64,
        )  # fmt: skip

    actual, _ = verified(compute, execute)
    out, bound = attend(f64(q)[0], torch.cat((window_rows, entry_rows)), f64(sinks), BF16, DIM**-0.5)
    assert_within(actual[0], out, bound)


def test_indexer_topk(execute, rng, device):
    """Whole numbers, whose scores are exact: the best 512 of 700 fp8 keys for each of two tokens."""
    count, topk, heads, dim = 700, 512, 64, 128
    cache = make_cache(RowFormat.fp8(dim), 64, [count], rng, device)
    keys = f64(cache.put(0, integers(rng, -2, 2, count, dim)))
    q, weights = integers(rng, -2, 2, 2, heads, dim, dtype=BF16), integers(rng, -4, 4, 2, heads)
    positions = torch.tensor([4 * count - 1, 4 * 600 - 1])
    cos_sin = torch.cat((torch.ones(2, ROPE // 2), torch.zeros(2, ROPE // 2)), dim=1)

    def compute():
        return indexer_topk(
            q, cos_sin, weights, cache.rows, positions, torch.zeros(2, dtype=torch.int32), ratio=4, topk=topk,
            max_entries=count, scale=1.0,
        )  # fmt: skip

    actual, _ = verified(compute, execute)
    scores = (torch.einsum("thd,sd->ths", f64(q), keys).clamp(min=0) * f64(weights)[..., None]).sum(1)
    for token, visible in enumerate((count, 600)):
        best = scores[token, :visible].argsort(descending=True, stable=True)[:topk]
        assert actual[token].tolist() == sorted(best.tolist())


@pytest.mark.parametrize("name", ["int4-g32", "fp4"])
def test_packed_experts(execute, rng, name):
    """Two tokens: the tiles of a decoding step, over fewer rows and columns than Flash has."""
    hidden, inner, experts = 1024, 256, 4
    scheme13, scheme2 = scheme_of(name, hidden), scheme_of(name, inner)
    w13 = stacked([random_weight(scheme13, inner, hidden) for _ in range(2 * experts)], experts, 2)
    w2 = stacked([random_weight(scheme2, hidden, inner) for _ in range(experts)], experts)
    x, weights = normal(rng, 2, hidden, scale=0.1, dtype=BF16), torch.rand(2, 2, generator=rng)
    ids = torch.tensor([[3, 0], [3, 1]])

    def compute():
        return packed_experts(x, w13, w2, scheme13, scheme2, weights, ids, swiglu_limit=10.0)

    actual, _ = verified(compute, execute, SCHEDULES[:2])
    dense13, dense2 = dense(w13, scheme13, BF16).flatten(1, 2), dense(w2, scheme2, BF16)
    check_experts(actual, experts_in_fp64(x, dense13, dense2, weights, ids, 10.0), x)
