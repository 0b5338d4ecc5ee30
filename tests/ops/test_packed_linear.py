"""A linear over a packed weight: bit-exact columns from one-hot inputs, then sums against fp64."""

import dataclasses

import pytest
import torch

from testing.ops.numeric import U32, assert_exact, assert_within, f64, normal
from testing.ops.packed_weights import SCHEMES, random_weight, scheme_of
from vllm_deepseek_v4flash.ops.packed_linear import packed_linear
from vllm_deepseek_v4flash.ops.packed_weight import dequantise
from vllm_deepseek_v4flash.ops.torch import packed_linear as in_blocks

N = 24


def check(actual, x, weight, scheme):
    """[T, N] against fp64: W rounded to the dtype of x, products and sums in fp32, the result rounded once."""
    values = f64(dequantise({name: t.cpu() for name, t in weight.items()}, scheme).to(x.dtype))
    assert_within(actual, f64(x) @ values.T, 2 * x.shape[-1] * U32 * (f64(x).abs() @ values.abs().T))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_hot_inputs_return_the_dequantised_columns_bit_for_bit(device, name, dtype):
    scheme = scheme_of(name, 128)
    weight = random_weight(scheme, N, 128, device)
    expected = dequantise({name: t.cpu() for name, t in weight.items()}, scheme).T.to(dtype)
    columns = torch.randperm(128)
    for some in (columns, columns[:40], columns[:16]):  # which are read in words of different sizes
        # A sum that begins with +0 has no -0.
        out = packed_linear(torch.eye(128, dtype=dtype, device=device)[some], weight, scheme)
        assert_exact(out, expected[some] + 0.0)


# All columns in one program or in several; rows that fill no tile, and several of them.
@pytest.mark.parametrize("shape", [(1, 24, 768), (5, 72, 384), (40, 136, 128), (70, 24, 128), (130, 24, 128)], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_sums(device, rng, name, shape):
    tokens, rows, columns = shape
    scheme = scheme_of(name, columns)
    weight, x = random_weight(scheme, rows, columns, device), normal(rng, tokens, columns, device=device)
    x = x.to(torch.float32 if shape == (5, 72, 384) else torch.bfloat16)
    out = packed_linear(x, weight, scheme)
    check(out, x, weight, scheme)
    assert torch.equal(packed_linear(x, weight, scheme), out)


@pytest.mark.parametrize("name", ["int4-g32", "int4-act-order", "fp4", "fp8"])
def test_groups_meet_their_own_rows(device, rng, name):
    groups, rows, columns = 3, 128, 128
    scheme = scheme_of(name, columns)
    weight = random_weight(scheme, groups * rows, columns, device)
    x = normal(rng, 5, groups, columns, device=device, dtype=torch.bfloat16)
    together = packed_linear(x, weight, scheme)
    assert together.shape == (5, groups, rows)
    for group in range(groups):
        own = {
            name: t if name == "perm" else t[group * t.shape[0] // groups : (group + 1) * t.shape[0] // groups]
            for name, t in weight.items()
        }
        check(together[:, group], x[:, group], own, scheme)


def test_strided_inputs(device, rng):
    scheme = SCHEMES["fp4"]
    weight, x = random_weight(scheme, N, 64, device), normal(rng, 5, 131, device=device, dtype=torch.bfloat16)
    inner = x[:, 1:65]
    assert torch.equal(packed_linear(inner, weight, scheme), packed_linear(inner.clone(), weight, scheme))


def test_no_tokens(device):
    scheme = SCHEMES["fp8"]
    weight = random_weight(scheme, N, 128, device)
    assert packed_linear(torch.zeros(0, 128, device=device), weight, scheme).shape == (0, N)
    assert packed_linear(torch.zeros(0, 2, 128, device=device), weight, scheme).shape == (0, 2, N // 2)


def test_groups_that_do_not_divide_the_rows_are_named(device):
    weight, x = random_weight(SCHEMES["fp4"], N, 128, device), torch.randn(2, 5, 128, device=device)
    with pytest.raises(ValueError, match="5 groups, which do not divide the weight's 24 rows"):
        packed_linear(x, weight, SCHEMES["fp4"])


@pytest.mark.parametrize("name", ["int4-g32", "fp8"])
@pytest.mark.parametrize("shape", [(4, 128), (4, 3, 128)], ids=str)
def test_blocks_of_rows_change_nothing(name, shape, monkeypatch):
    scheme = SCHEMES[name]
    weight, x = random_weight(scheme, 300, 128), torch.randn(shape)
    whole = in_blocks.packed_linear(x, weight, scheme)
    monkeypatch.setattr(in_blocks, "_WORKSPACE", 1)
    # Each output is one dot product, whichever block it is in; a GEMM may order its sum differently by shape.
    torch.testing.assert_close(
        in_blocks.packed_linear(x, weight, scheme), whole, rtol=0, atol=128 * U32 * float(whole.abs().max())
    )


def test_schemes_of_equal_layout_are_equal():
    scheme = SCHEMES["fp4"]
    assert dataclasses.replace(scheme, module="a", source="b", shape=(1, 2)) == scheme
