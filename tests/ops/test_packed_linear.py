"""Linears and experts over packed weights: bit-exact rows from one-hot inputs, then sums against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vllm_deepseek_v4flash.ops.fused_experts import fused_experts
from vllm_deepseek_v4flash.ops.packed_experts import packed_experts
from vllm_deepseek_v4flash.ops.packed_linear import packed_linear
from vllm_deepseek_v4flash.ops.reference import packed_experts as packed_experts_reference
from vllm_deepseek_v4flash.ops.reference import packed_linear as packed_linear_reference
from vllm_deepseek_v4flash.quantization.scheme import Scheme, canonical_shapes, dequantise

SCHEMES = {
    "int4-g32": Scheme("int4", 32, scale_dtype=torch.float16),
    "int4-g64-zeros": Scheme("int4", 64, zero_points=True, scale_dtype=torch.bfloat16),
    "int4-act-order": Scheme("int4", 32, act_order=True, scale_dtype=torch.float16),
    "int4-channel": Scheme("int4", 128, scale_dtype=torch.bfloat16),
    "fp4": Scheme("fp4", 32),
    "fp8": Scheme("fp8", 128, scale_dtype=torch.float32),
}
N, K = 24, 128


def random_weight(scheme: Scheme, n: int = N, k: int = K) -> dict[str, torch.Tensor]:
    weight = {}
    for name, (shape, dtype) in canonical_shapes(scheme, n, k).items():
        if name == "perm":
            weight[name] = torch.randperm(k).to(dtype)
        elif name == "scales":
            weight[name] = (
                torch.randint(118, 128, shape).to(dtype) if scheme.kind == "fp4" else torch.rand(shape).to(dtype)
            )
        elif scheme.kind == "fp8":
            weight[name] = torch.randn(shape).to(dtype)
        else:
            weight[name] = torch.randint(0, 16 if name == "zeros" else 256, shape).to(dtype)
    return weight


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_hot_inputs_return_the_dequantised_columns_bit_for_bit(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = random_weight(scheme)
    assert torch.equal(packed_linear(torch.eye(K, dtype=dtype), weight, scheme), dequantise(weight, scheme).T.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_sums_and_groups(scheme: Scheme) -> None:
    weight, x = random_weight(scheme), torch.randn(5, K)
    exact = x.double() @ dequantise(weight, scheme).double().T
    # A sum of K products, each rounded once and added with one more rounding.
    bound = 2 * K * 2.0**-24 * (x.abs().double() @ dequantise(weight, scheme).abs().double().T)
    assert ((packed_linear(x, weight, scheme) - exact).abs() <= bound).all()
    grouped = torch.randn(5, 3, K)
    together = packed_linear(grouped, weight, scheme)
    assert together.shape == (5, 3, N // 3)
    for group in range(3):
        alone = packed_linear(grouped[:, group], weight, scheme)[:, group * N // 3 : (group + 1) * N // 3]
        torch.testing.assert_close(together[:, group], alone, rtol=0, atol=float(bound.max()))


def test_groups_that_do_not_divide_the_rows_are_named() -> None:
    with pytest.raises(ValueError, match="5 groups, which do not divide the weight's 24 rows"):
        packed_linear(torch.randn(2, 5, K), random_weight(SCHEMES["fp4"]), SCHEMES["fp4"])


@pytest.mark.parametrize("name", ["int4-g32", "fp8"])
def test_row_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = SCHEMES[name]
    weight, x = random_weight(scheme, n=300), torch.randn(4, K)
    whole = packed_linear(x, weight, scheme)
    monkeypatch.setattr(packed_linear_reference, "_WORKSPACE", 1)
    # Each output is one dot product, whichever block it is in; a GEMM may order its sum differently by shape.
    torch.testing.assert_close(
        packed_linear(x, weight, scheme), whole, rtol=0, atol=K * 2.0**-24 * float(whole.abs().max())
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("first", [0, 2])
def test_experts_equal_those_of_dequantised_weights(scheme: Scheme, first: int) -> None:
    experts, inner, hidden, tokens, topk = 3, 128, 128, 7, 2
    stacks = [random_weight(scheme, inner, hidden) for _ in range(2 * experts)]
    downs = [random_weight(scheme, hidden, inner) for _ in range(experts)]
    w13 = {n: torch.stack([s[n] for s in stacks]).unflatten(0, (experts, 2)) for n in stacks[0]}
    w2 = {n: torch.stack([s[n] for s in downs]) for n in downs[0]}
    dense13 = torch.stack([dequantise(s, scheme) for s in stacks]).unflatten(0, (experts, 2)).flatten(1, 2)
    dense2 = torch.stack([dequantise(s, scheme) for s in downs])
    x = torch.randn(tokens, hidden) / 16
    weights, ids = torch.rand(tokens, topk), torch.randint(0, experts + 2, (tokens, topk))
    ours = packed_experts(x, w13, w2, scheme, scheme, weights, ids, swiglu_limit=1.0, first_expert=first)
    dense = fused_experts(x, dense13, dense2, weights, ids, swiglu_limit=1.0, first_expert=first)
    # The same products in the same order but for how a GEMM splits 2I rows or I: a few ulps of the largest value.
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5 * float(dense.abs().max()))
    assert dense.abs().max() > 0


def test_only_routed_experts_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, experts = SCHEMES["int4-g32"], 8
    w13 = {n: t.expand(experts, 2, *t.shape) for n, t in random_weight(scheme, 64, 64).items()}
    w2 = {n: t.expand(experts, *t.shape) for n, t in random_weight(scheme, 64, 64).items()}
    calls = []

    def counted(x: torch.Tensor, weight: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
        calls.append(weight["qweight"].data_ptr())
        return packed_linear(x, weight, scheme)

    monkeypatch.setattr(packed_experts_reference, "packed_linear", counted)
    ids = torch.tensor([[5, 1]])
    packed_experts(torch.randn(1, 64), w13, w2, scheme, scheme, torch.rand(1, 2), ids, swiglu_limit=10.0)
    assert len(calls) == 3 * 2  # w1, w3 and w2 of two experts of eight


def test_schemes_of_equal_layout_are_equal() -> None:
    scheme = SCHEMES["fp4"]
    assert dataclasses.replace(scheme, module="a", source="b", shape=(1, 2)) == scheme
