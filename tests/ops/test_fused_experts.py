"""The routed experts, one token and one expert at a time (docs/model.md, "Mixture of experts")."""

import itertools
import math
from typing import Any

import pytest
import torch

from testing.ops.numeric import normal
from testing.ops.packed_weights import check_experts as check
from testing.ops.packed_weights import experts_in_fp64 as oracle
from vllm_deepseek_v4flash.ops.fused_experts import fused_experts


def problem(
    rng, device, *, tokens=9, hidden=40, inner=24, experts=6, topk=3, dtype=torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = normal(rng, tokens, hidden, device=device, dtype=dtype)
    w13 = normal(rng, experts, 2 * inner, hidden, scale=hidden**-0.5, device=device, dtype=dtype)
    w2 = normal(rng, experts, hidden, inner, scale=inner**-0.5, device=device, dtype=dtype)
    weights = torch.rand(tokens, topk, generator=rng).to(device)
    ids = torch.stack([torch.randperm(experts, generator=rng)[:topk] for _ in range(tokens)] or [torch.zeros(topk)])
    return x, w13, w2, weights, ids[:tokens].long().to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 10.0, 0.5])
def test_matches_the_formula(device, rng, dtype, limit):
    arguments = problem(rng, device, dtype=dtype)
    check(fused_experts(*arguments, swiglu_limit=limit), oracle(*arguments, limit), arguments[0])


@pytest.mark.parametrize("shape", [(1, 32, 16, 4, 1), (17, 33, 7, 5, 5), (40, 16, 8, 32, 2)], ids=str)
def test_other_shapes(device, rng, shape):
    arguments = problem(rng, device, **dict(zip(("tokens", "hidden", "inner", "experts", "topk"), shape, strict=True)))
    check(fused_experts(*arguments, swiglu_limit=1.0), oracle(*arguments, 1.0), arguments[0])


def test_experts_that_no_token_chose_are_not_read(device, rng):
    x, w13, w2, weights, ids = problem(rng, device)
    ids = torch.where(ids % 2 == 0, ids, (ids + 1) % 6)
    w13[1::2], w2[1::2] = torch.nan, torch.nan
    check(fused_experts(x, w13, w2, weights, ids, swiglu_limit=10.0), oracle(x, w13, w2, weights, ids, 10.0), x)


def test_all_tokens_on_one_expert(device, rng):
    x, w13, w2, weights, ids = problem(rng, device, tokens=20, topk=1)
    ids = torch.full_like(ids, 4)
    check(fused_experts(x, w13, w2, weights, ids, swiglu_limit=10.0), oracle(x, w13, w2, weights, ids, 10.0), x)


def test_an_expert_listed_twice_counts_twice(device, rng):
    x, w13, w2, weights, ids = problem(rng, device, topk=2)
    ids = torch.full_like(ids, 2)
    check(fused_experts(x, w13, w2, weights, ids, swiglu_limit=10.0), oracle(x, w13, w2, weights, ids, 10.0), x)
    once = weights.sum(-1, keepdim=True)
    check(fused_experts(x, w13, w2, weights, ids, swiglu_limit=10.0), oracle(x, w13, w2, once, ids[:, :1], 10.0), x)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 6], [0, 2, 4, 6], [0, 3, 3, 6]])
def test_ranks_sum_to_the_whole(device, rng, cuts, ids_dtype):
    x, w13, w2, weights, ids = problem(rng, device)
    total = torch.zeros(x.shape, device=device)
    for low, high in itertools.pairwise(cuts):
        part = fused_experts(
            x, w13[low:high], w2[low:high], weights, ids.to(ids_dtype), swiglu_limit=10.0, first_expert=low
        )
        check(part, oracle(x, w13[low:high], w2[low:high], weights, ids, 10.0, low), x)
        total += part
    check(total, oracle(x, w13, w2, weights, ids, 10.0), x)


def test_ids_of_no_rank_are_ignored(device, rng):
    x, w13, w2, weights, ids = problem(rng, device)
    ids[0], ids[1, 0], ids[2, 1] = -1, 6, 2**20
    actual = fused_experts(x, w13, w2, weights, ids, swiglu_limit=10.0)
    check(actual, oracle(x, w13, w2, weights, ids, 10.0), x)
    assert not actual[0].any()


def test_weight_is_applied_before_the_rounding_of_the_activation(device):
    # One expert of one channel: silu(3) * 0.3 rounds to 219/256, and silu(3) rounded, times 0.3, to 220/256.
    x = torch.tensor([[1.0]], dtype=torch.bfloat16, device=device)
    w13 = torch.tensor([[[3.0], [1.0]]], dtype=torch.bfloat16, device=device)
    w2 = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device)
    weight, ids = torch.tensor([[0.3]], device=device), torch.zeros(1, 1, dtype=torch.int64, device=device)
    assert fused_experts(x, w13, w2, weight, ids, swiglu_limit=None).item() == 219 / 256


def test_experts_are_summed_in_fp32(device):
    # bf16 cannot hold 256 + 1.
    x = torch.tensor([[1.0]], dtype=torch.bfloat16, device=device)
    w13 = torch.ones(2, 2, 1, dtype=torch.bfloat16, device=device)
    w2 = torch.tensor([[[256.0]], [[1.0]]], dtype=torch.bfloat16, device=device)
    silu = 1 / (1 + math.exp(-1))
    weights = torch.full((1, 2), 1 / silu, device=device)
    ids = torch.tensor([[0, 1]], device=device)
    assert fused_experts(x, w13, w2, weights, ids, swiglu_limit=None).item() == 257.0


def test_no_tokens(device, rng):
    arguments = problem(rng, device, tokens=0)
    assert fused_experts(*arguments, swiglu_limit=10.0).shape == (0, 40)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("w13", (6, 48, 39)), ("w2", (6, 40, 23)), ("w2", (5, 40, 24)), ("topk_weights", (8, 3)), ("topk_ids", (9, 2))],
)
def test_wrong_shapes_are_named(device, rng, name, shape):
    arguments: dict[str, Any] = dict(
        zip(("x", "w13", "w2", "topk_weights", "topk_ids"), problem(rng, device), strict=True)
    )
    arguments[name] = torch.zeros(shape, dtype=arguments[name].dtype, device=device)
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        fused_experts(**arguments, swiglu_limit=None)
