"""Expert selection (docs/model.md, "Mixture of experts")."""

import math

import pytest
import torch

from testing.ops.numeric import FUNCTION, U32, assert_within, f64, normal
from vllm_deepseek_v4flash.ops.route import route


def oracle(logits, topk, bias, expert_ids, scaling, renormalize=True):
    weights, chosen = [], []
    for t, row in enumerate(f64(logits).tolist()):
        scores = [math.sqrt(max(z, 0) + math.log1p(math.exp(-abs(z)))) for z in row]
        if expert_ids is None:
            biased = scores if bias is None else [s + b for s, b in zip(scores, f64(bias).tolist(), strict=True)]
            ids = sorted(range(len(row)), key=lambda e: (-biased[e], e))[:topk]
        else:
            ids = expert_ids[t].tolist()
        total = sum(scores[e] for e in ids) if renormalize else 1.0
        weights.append([scores[e] / total * scaling for e in ids])
        chosen.append(ids)
    return torch.tensor(weights, dtype=torch.float64).view(-1, topk), torch.tensor(chosen).view(-1, topk)


def check(actual, expected, topk, logits):
    weights, ids = actual
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert torch.equal(ids.cpu(), expected[1])
    # softplus, root, a sum of topk terms, division and the scaling; exp of x through exp2 errs by |x| * U32 more.
    largest = max([1.0, *f64(logits).abs().flatten().tolist()])
    assert_within(weights, expected[0], (3 * FUNCTION + (topk + largest) * U32) * expected[0].abs())


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(7, 8, 2), (9, 256, 6), (150, 7, 3), (4, 5, 5), (0, 8, 2)])
@pytest.mark.parametrize("biased", [True, False])
def test_matches_the_formula(device, rng, tokens, experts, topk, biased):
    logits = normal(rng, tokens, experts, scale=3, device=device)
    bias = normal(rng, experts, device=device) if biased else None
    actual = route(logits, topk, bias=bias, expert_ids=None, scaling=1.5)
    check(actual, oracle(logits, topk, bias, None, 1.5), topk, logits)


def test_bias_decides_the_choice_and_leaves_the_weights(device):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([-5.0, 0.0, 0.0, 5.0], device=device)
    weights, ids = route(logits, 2, bias=bias, expert_ids=None, scaling=1.5)
    assert ids.tolist() == [[3, 1]]
    a, b = math.sqrt(math.log1p(math.exp(-1))), math.sqrt(math.log1p(math.exp(1)))
    assert weights[0].tolist() == pytest.approx([1.5 * a / (a + b), 1.5 * b / (a + b)], rel=3 * FUNCTION)


def test_equal_scores_go_to_the_smaller_expert(device):
    logits = torch.zeros(3, 64, device=device)
    logits[1, [50, 9, 33]] = 1.0
    logits[2, ::2] = -1.0
    _, ids = route(logits, 6, bias=None, expert_ids=None, scaling=1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5], [9, 33, 50, 0, 1, 2], [1, 3, 5, 7, 9, 11]]


def test_a_tie_made_by_the_bias_goes_to_the_smaller_expert(device):
    # Equal logits, equal biases: equal sums on every device.
    logits = torch.tensor([[0.5, 3.0, 0.5, 0.5]], device=device)
    bias = torch.tensor([4.0, -9.0, 4.0, 4.0], device=device)
    assert route(logits, 2, bias=bias, expert_ids=None, scaling=1.0)[1].tolist() == [[0, 2]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hash_layers_take_the_table_and_weigh_by_score(device, rng, dtype):
    logits = normal(rng, 5, 8, device=device)
    table = torch.tensor([[7, 0], [3, 4], [0, 7], [6, 5], [1, 2]], dtype=dtype, device=device)
    actual = route(logits, 2, bias=None, expert_ids=table, scaling=2.5)
    check(actual, oracle(logits, 2, None, table, 2.5), 2, logits)


def test_scores_near_the_smallest_numbers_of_fp32(device):
    """exp(-90) is subnormal, which a GPU takes for zero; its root is not."""
    logits = torch.tensor([[-90.0, -89.0, -88.0, -1e3]], device=device)
    actual = route(logits, 2, bias=None, expert_ids=None, scaling=1.5)
    check(actual, oracle(logits, 2, None, None, 1.5), 2, logits[:, :3])


def test_weights_sum_to_the_scaling_unless_told_otherwise(device, rng):
    logits = normal(rng, 6, 16, device=device)
    weights, _ = route(logits, 4, bias=None, expert_ids=None, scaling=1.5)
    assert_within(weights.sum(-1), torch.full((6,), 1.5, dtype=torch.float64), 8 * U32 * 1.5)
    actual = route(logits, 4, bias=None, expert_ids=None, scaling=1.5, renormalize=False)
    check(actual, oracle(logits, 4, None, None, 1.5, renormalize=False), 4, logits)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "topk"), [(9, 256, 6), (3, 8, 4), (0, 8, 2)])
def test_the_shared_expert_is_listed_last_with_weight_1(device, rng, tokens, experts, topk, hashed):
    logits = normal(rng, tokens, experts, device=device)
    bias = None if hashed else normal(rng, experts, device=device)
    table = torch.randint(0, experts, (tokens, topk), generator=rng).to(device) if hashed else None
    weights, ids = route(logits, topk, bias=bias, expert_ids=table, scaling=1.5, shared=True)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert ids[:, topk].tolist() == [experts] * tokens
    assert weights[:, topk].tolist() == [1.0] * tokens
    assert weights.is_contiguous()
    assert ids.is_contiguous()
    check((weights[:, :topk], ids[:, :topk]), oracle(logits, topk, bias, table, 1.5), topk, logits)


def test_logits_may_be_part_of_a_wider_tensor(device, rng):
    logits = normal(rng, 5, 40, device=device)[:, 3:35:2]
    table = torch.stack((torch.arange(5), torch.arange(5) + 9, torch.arange(5) + 4), dim=1).to(device)[:, ::2]
    check(route(logits, 3, bias=None, expert_ids=None, scaling=1.0), oracle(logits, 3, None, None, 1.0), 3, logits)
    check(route(logits, 2, bias=None, expert_ids=table, scaling=1.0), oracle(logits, 2, None, table, 1.0), 2, logits)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_experts_are_distinct_for_any_logits(device, broken):
    """What is chosen becomes an address: it must be an expert even where a model has diverged."""
    logits = torch.full((3, 20), broken, device=device)
    logits[1, 4] = logits[2, 19] = 1.0
    bias = torch.full((20,), broken, device=device)
    for chosen in (None, bias):
        ids = route(logits, 6, bias=chosen, expert_ids=None, scaling=1.0)[1].cpu()
        assert all(len(set(row)) == 6 for row in ids.tolist())
        assert ((ids >= 0) & (ids < 20)).all()


def test_large_logits_of_either_sign(device):
    logits = torch.tensor([[60.0, -20.0, -30.0, -40.0], [-60.0, -61.0, -62.0, -63.0]], device=device)
    check(route(logits, 3, bias=None, expert_ids=None, scaling=1.5), oracle(logits, 3, None, None, 1.5), 3, logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"logits": torch.zeros(2, 8).half()}, "logits must be torch.float32, got torch.float16", id="dtype"
        ),
        pytest.param({"topk": 9}, r"topk must be in 1\.\.8 .*got 9", id="topk"),
        pytest.param({"topk": 0}, r"topk must be in 1\.\.8 .*got 0", id="topk-zero"),
        pytest.param({"bias": torch.zeros(7)}, r"bias must have shape \[8\], got \[7\]", id="bias"),
        pytest.param({"expert_ids": torch.zeros(2, 3).long()}, r"expert_ids must have shape \[2, 2\]", id="table"),
    ],
)
def test_wrong_arguments_are_named(device, change, message):
    arguments = {"logits": torch.zeros(2, 8), "topk": 2, "bias": None, "expert_ids": None, "scaling": 1.0, **change}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        route(arguments.pop("logits"), arguments.pop("topk"), **arguments)
