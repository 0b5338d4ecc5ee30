"""The experts of csrc/ against dequantised weights in fp64: emulated thread by thread, and as compiled on a GPU."""

import functools
from typing import Any

import pytest
import torch

from testing.logs import recorded
from testing.ops.cuda_experts import INT4, SCHEMES, Problem, packed
from testing.ops.numeric import assert_exact
from vllm_deepseek_v4flash.log import info_once
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.cuda import packed_experts as cuda
from vllm_deepseek_v4flash.ops.packed_weight import Scheme


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def make(request, monkeypatch):
    """Makes a `Problem` for the kernels of either kind, which may leave nothing to Triton."""

    def refuse(*arguments, **options):
        raise AssertionError("left to Triton")

    monkeypatch.setattr(cuda, "triton_packed_experts", refuse)
    if request.param == "emulated":
        emulated = request.getfixturevalue("emulated")
        monkeypatch.setattr(cuda, "library", lambda: emulated)
    return functools.partial(
        Problem, torch.Generator().manual_seed(7), "cpu" if request.param == "emulated" else "cuda"
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_matches_the_formula(make, scheme):
    make(scheme, hidden=1408, inner=96).check()


@pytest.mark.parametrize(
    ("hidden", "inner"),
    [
        pytest.param(64, 32, id="less than a step of one warp"),
        pytest.param(4352, 32, id="queues that go round"),
    ],
)
def test_queues(make, hidden, inner):
    make(hidden=hidden, inner=inner, tokens=1).check()


@pytest.mark.parametrize("limit", [0.05, None])
def test_clamp(make, limit):
    problem = make()
    problem.check(torch.inf if limit is None else limit)
    assert (problem.run(limit) != problem.run(10.0)).any() == (limit is not None)


@pytest.mark.parametrize("limit", [0.05, None])
def test_a_nan_goes_through(make, limit):
    problem = make()
    finite = problem.run(limit)
    problem.x[1, 3] = torch.nan
    actual = problem.run(limit)
    assert actual[1].isnan().all()
    assert_exact(actual[[0, 2]], finite[[0, 2]])


def write(tensors, scheme, at, values, exponent=0):
    """Make one weight of a stack hold `values` [N, K], whole numbers from 0 to 4, times 2^exponent."""
    if scheme.kind == "fp4":
        codes = torch.tensor([0, 2, 4, 5, 6])[values]
        tensors["scales"][at] = 127 + exponent
    else:
        zero = 8
        if scheme.zero_points:
            tensors["zeros"][at] = zero = 5
        codes = values + zero
        tensors["scales"][at] = 2.0**exponent
    tensors["qweight"][at] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_one_hot_inputs_return_the_dequantised_rows_bit_for_bit(make, scheme):
    """W1 gives 32, which silu leaves as it is, so that the activations are W3's column; W2 is the identity."""
    problem = make(scheme, tokens=32, topk=1, experts=1, hidden=256, inner=256)
    problem.x = torch.eye(256).bfloat16()[96:128]
    problem.weights = torch.full((32, 1), 1 / 32)
    write(problem.w13, problem.scheme13, (0, 0), torch.full((256, 256), 4), exponent=3)
    up = problem.dequantised(0)[1]
    write(problem.w2, problem.scheme2, 0, torch.eye(256, dtype=torch.int64))
    assert_exact(problem.run(None), up.T[96:128].bfloat16().float())
    # The other way round: W3 is the identity, and W2's columns come out in fp32.
    problem.w2 = packed(problem.rng, problem.scheme2, 1, 256, 256)
    down = problem.dequantised(0)[2]
    write(problem.w13, problem.scheme13, (0, 1), torch.eye(256, dtype=torch.int64))
    assert_exact(problem.run(None), down.T[96:128].float())


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([[2, 2], [2, 2], [2, 0]], id="an expert twice in one list"),
        pytest.param([[1]] * 9, id="more pairs of an expert than a block takes"),
        pytest.param([[i % 3, 3] for i in range(20)], id="pairs beyond the first 32, interleaved"),
        pytest.param([[3, 0, 1, 2]], id="one token"),
    ],
)
def test_routing(make, ids):
    make(ids=ids).check()


def test_as_many_tokens_as_are_taken_with_an_expert_that_all_visit(make):
    problem = make(tokens=cuda.MOST_TOKENS, topk=7, experts=41, hidden=64, inner=32)
    problem.ids[:, :6] %= 40
    problem.ids[:, 6], problem.weights[:, 6] = 40, 1.0
    problem.check()


@pytest.mark.parametrize("first", [2, 100, -100])
def test_experts_of_other_ranks_add_nothing(make, first):
    problem = make(experts=3, first=first, ids=[[0, 1, 2], [2, 3, 4], [5, 6, 7], [4, 9, 4], [0, -1, 0]])
    problem.check()
    reached = [True, True, False, True, False] if first == 2 else [False] * 5
    assert problem.run().any(dim=1).tolist() == reached


def test_a_token_is_computed_alike_alone_and_in_company(make):
    problem = make(tokens=9, topk=2)
    together = problem.run()
    everything = problem.x, problem.ids, problem.weights
    for token in range(9):
        problem.x, problem.ids, problem.weights = (tensor[token : token + 1] for tensor in everything)
        assert_exact(problem.run()[0], together[token])


def test_ids_and_inputs_in_other_layouts(make):
    problem = make()
    expected = problem.run()
    problem.ids = problem.ids.int()
    problem.x = torch.stack((problem.x, problem.x + 1), dim=2)[..., 0]
    problem.weights = torch.stack((problem.weights, problem.weights), dim=2)[..., 0]
    assert_exact(problem.run(), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "activations in torch.float16, not bfloat16"),
        ({"scheme2": Scheme("fp4", 32)}, "weights in int4 and fp4, not both"),
        ({"scheme13": Scheme("fp8", 128), "scheme2": Scheme("fp8", 128)}, "weights in fp8 and fp8, not both"),
        ({"scheme13": Scheme("int4", 32, act_order=True)}, "activation order"),
        ({"topk": 33}, "33 experts for each token"),
        ({"hidden": 80}, "80 columns in groups of 32, not in whole steps of 32"),
        ({"scheme13": Scheme("int4", 96)}, "288 columns in groups of 96"),
    ],
)
def test_what_the_kernels_cannot_compute_is_said(make, change, reason):
    problem = make()
    arguments: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "scheme13": INT4,
        "scheme2": INT4,
        "hidden": 288,
        "w2": problem.w2,
    }
    assert cuda.unsuitable(**arguments) is None
    assert reason in (cuda.unsuitable(**{**arguments, **change}) or "")


def test_asked_for_by_name_they_refuse_what_they_cannot_compute(make, monkeypatch):
    problem = make()
    problem.x = problem.x.half()
    monkeypatch.setattr(cuda, "triton_packed_experts", lambda *arguments, **options: "Triton's")
    info_once.cache_clear()
    with recorded(cuda.logger.name) as said:
        assert [problem.run(), problem.run()] == ["Triton's"] * 2
    (line,) = said.lines
    assert "csrc/'s cannot compute activations in torch.float16" in line
    with (
        dispatch.use("cuda"),
        pytest.raises(ValueError, match=r"OPS=cuda: csrc/'s experts cannot compute activations in torch\.float16"),
    ):
        problem.run()


@pytest.mark.parametrize("tokens", [0, cuda.MOST_TOKENS + 1])
def test_other_numbers_of_tokens_are_left_to_triton(make, monkeypatch, tokens):
    problem = make(tokens=tokens)
    monkeypatch.setattr(cuda, "triton_packed_experts", lambda *arguments, **options: "Triton's")
    info_once.cache_clear()
    with recorded(cuda.logger.name) as said:
        assert [problem.run(), problem.run()] == ["Triton's"] * 2
    assert said.lines == ["Experts run in csrc/'s kernels for up to 32 tokens at a time, and in Triton's beyond."]


@pytest.mark.parametrize("exponent", [0, 3, 127, 128, 200, 224])
def test_fp4_scales_of_every_size(make, exponent):
    """One hot, so that a column of W2 comes out; bf16 holds no weight that is smaller than its least number."""
    problem = make(SCHEMES["fp4"], tokens=32, topk=1, experts=1, hidden=256, inner=256)
    problem.x = torch.eye(256).bfloat16()[96:128]
    problem.weights = torch.full((32, 1), 1 / 32)
    write(problem.w13, problem.scheme13, (0, 0), torch.full((256, 256), 4), exponent=3)
    write(problem.w13, problem.scheme13, (0, 1), torch.eye(256, dtype=torch.int64))
    problem.w2["scales"][:, ::3] = exponent
    assert_exact(problem.run(None), problem.dequantised(0)[2].T[96:128].float())


def test_an_fp4_scale_that_is_not_a_number_gives_none(make):
    problem = make(SCHEMES["fp4"], tokens=2, topk=1, experts=1, hidden=256, inner=256)
    problem.w2["scales"][0, 5, 1] = 255
    assert problem.run().isnan().any(dim=0).nonzero().flatten().tolist() == [5]
