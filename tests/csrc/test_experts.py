"""The experts of csrc/ against dequantised weights in fp64: emulated thread by thread, and as compiled on a GPU."""

import dataclasses
import functools
import itertools

import pytest
import torch

from testing.ops.numeric import FUNCTION, U32, U, assert_exact, assert_within, f64
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.cuda import packed_experts as cuda
from vllm_deepseek_v4flash.ops.packed_weight import Scheme, canonical_shapes, dequantise

BF16 = U[torch.bfloat16]
SCHEMES = {
    "int4, groups of 32, fp16": Scheme("int4", 32, scale_dtype=torch.float16),
    "int4, groups of 64, zeros, bf16": Scheme("int4", 64, zero_points=True, scale_dtype=torch.bfloat16),
    "int4, groups of 128, zeros, fp32": Scheme("int4", 128, zero_points=True, scale_dtype=torch.float32),
    "int4, groups of 256": Scheme("int4", 256, scale_dtype=torch.float16),
    "fp4": Scheme("fp4", 32),
}
INT4 = SCHEMES["int4, groups of 32, fp16"]


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


def packed(rng, scheme, *shape):
    """Random canonical tensors [*shape[:-2], ...] of weights [..., N, K]; rows and scales of every size and sign."""
    *stack, n, k = shape
    tensors = {}
    for name, (size, dtype) in canonical_shapes(scheme, n, k).items():
        size = (*stack, *size)
        if name != "scales":
            tensors[name] = torch.randint(0, 16 if name == "zeros" else 256, size, generator=rng).to(dtype)
        elif scheme.kind == "fp4":
            tensors[name] = torch.randint(118, 126, size, generator=rng).to(dtype)
        else:
            tensors[name] = ((torch.rand(size, generator=rng) - 0.3) / 16).to(dtype)
    return tensors


class Problem:
    def __init__(
        self, rng, device, scheme=INT4, *, tokens=3, topk=2, experts=4, inner=64, hidden=288, ids=None, first=0
    ):
        # A group as wide as the weight is channel-wise: its width differs between the two.
        def fitted(columns):
            return dataclasses.replace(scheme, group_size=columns) if columns % scheme.group_size else scheme

        self.rng, self.device = rng, device
        self.scheme13, self.scheme2, self.first = fitted(hidden), fitted(inner), first
        self.w13 = packed(rng, self.scheme13, experts, 2, inner, hidden)
        self.w2 = packed(rng, self.scheme2, experts, hidden, inner)
        self.ids = torch.randint(0, experts, (tokens, topk), generator=rng) if ids is None else torch.tensor(ids)
        self.weights = torch.rand(self.ids.shape, generator=rng)
        self.x = torch.randn(len(self.ids), hidden, generator=rng).bfloat16()

    def run(self, limit=10.0):
        x, weights, ids = (tensor.to(self.device) for tensor in (self.x, self.weights, self.ids))
        w13, w2 = ({n: t.to(self.device) for n, t in weight.items()} for weight in (self.w13, self.w2))
        return cuda.packed_experts(
            x, w13, w2, self.scheme13, self.scheme2, weights, ids, swiglu_limit=limit, first_expert=self.first
        )

    def dequantised(self, expert):
        gate, up = (dequantise({n: t[expert, i] for n, t in self.w13.items()}, self.scheme13).double() for i in (0, 1))
        return gate, up, dequantise({n: t[expert] for n, t in self.w2.items()}, self.scheme2).double()

    def expected(self, limit=10.0):
        """The sums in fp64, and how far fp32 sums and one rounding of the activations may be from them."""
        out, bound = torch.zeros(self.x.shape, dtype=torch.float64), torch.zeros(self.x.shape, dtype=torch.float64)
        columns, inner, topk = self.x.shape[1], self.w2["qweight"].shape[-1] * 2, self.ids.shape[1]
        for token, k in itertools.product(range(len(self.x)), range(topk)):
            expert = int(self.ids[token, k]) - self.first
            if not 0 <= expert < len(self.w2["qweight"]):
                continue
            gate_weight, up_weight, down_weight = self.dequantised(expert)
            x = f64(self.x[token])
            gate, up = gate_weight @ x, up_weight @ x
            # Sums of `columns` products; a group's factor is one more of each.
            gate_error, up_error = (2 * columns * U32 * (w.abs() @ x.abs()) for w in (gate_weight, up_weight))
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            weight = float(self.weights[token, k])
            activation = torch.nn.functional.silu(gate) * up * weight
            # silu's slope is below 1.1, and |silu(gate)| <= |gate|.
            error = weight * (1.1 * gate_error * up.abs() + (gate.abs() + gate_error) * up_error)
            error = error + (BF16 + 4 * FUNCTION) * (activation.abs() + error) + 2.0**-133
            out[token] += down_weight @ activation
            sums = (inner + topk) * 2 * U32
            bound[token] += down_weight.abs() @ (error + sums * (activation.abs() + error))
        return out, bound

    def check(self, limit=10.0):
        actual = self.run(limit)
        assert actual.dtype == torch.float32
        assert_within(actual, *self.expected(limit))
        # The counters are left as they were found.
        assert_exact(self.run(limit), actual)


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
        ({"hidden": 80}, "80 columns in groups of 32, not in whole steps of 32"),
        ({"scheme13": Scheme("int4", 96)}, "288 columns in groups of 96"),
    ],
)
def test_what_the_kernels_cannot_compute_is_said(make, change, reason):
    problem = make()
    arguments = {"dtype": torch.bfloat16, "scheme13": INT4, "scheme2": INT4, "hidden": 288, "w2": problem.w2}
    assert cuda.unsuitable(**arguments) is None
    assert reason in cuda.unsuitable(**{**arguments, **change})


def test_asked_for_by_name_they_refuse_what_they_cannot_compute(make, monkeypatch):
    problem = make()
    problem.x = problem.x.half()
    monkeypatch.setattr(cuda, "triton_packed_experts", lambda *arguments, **options: "Triton's")
    cuda._tell.cache_clear()
    told = []
    monkeypatch.setattr(cuda.logger, "info", lambda message, *values: told.append(message % values))
    assert [problem.run(), problem.run()] == ["Triton's"] * 2
    assert len(told) == 1
    assert "csrc/'s cannot compute activations in torch.float16" in told[0]
    with (
        dispatch.use("cuda"),
        pytest.raises(ValueError, match=r"OPS=cuda: csrc/'s experts cannot compute activations in torch\.float16"),
    ):
        problem.run()


@pytest.mark.parametrize("tokens", [0, cuda.MOST_TOKENS + 1])
def test_other_numbers_of_tokens_are_left_to_triton(make, monkeypatch, tokens):
    problem = make(tokens=tokens)
    monkeypatch.setattr(cuda, "triton_packed_experts", lambda *arguments, **options: "Triton's")
    cuda._tell_bound.cache_clear()
    told = []
    monkeypatch.setattr(cuda.logger, "info", lambda message, *values: told.append(message % values))
    assert [problem.run(), problem.run()] == ["Triton's"] * 2
    assert told == ["Experts run in csrc/'s kernels for up to 32 tokens at a time, and in Triton's beyond."]
