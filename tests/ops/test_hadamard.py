"""The Hadamard transform against its matrix (docs/model.md, "Indexer")."""

import pytest
import torch

from testing.ops import codecs
from testing.ops.numeric import FUNCTION, U32, assert_exact, assert_within, f64, integers, normal
from vllm_deepseek_v4flash.ops.hadamard import hadamard


@pytest.mark.parametrize("dim", [1, 2, 32, 64, 128])
def test_is_the_sylvester_matrix(device, rng, dim):
    x = normal(rng, 3, 2, dim, device=device)
    expected = torch.tensor([[codecs.sylvester(row) for row in rows] for rows in f64(x).tolist()])
    # log2(dim) additions in a butterfly, then one product with a rounded dim^-0.5.
    bound = (dim.bit_length() + 1) * U32 * f64(x).abs().sum(-1, keepdim=True) * dim**-0.5
    assert_within(hadamard(x), expected, bound)


def test_is_exact_where_the_norm_is(device, rng):
    x = integers(rng, -100, 100, 5, 64, device=device)
    expected = torch.tensor([codecs.sylvester(row) for row in f64(x).tolist()]).float()
    assert_exact(hadamard(x), expected)


def test_is_its_own_inverse(device, rng):
    x = normal(rng, 4, 128, device=device)
    # Twice the bound of one transform; the first one's errors are transformed, which keeps their norm.
    assert_within(hadamard(hadamard(x)), f64(x), 20 * U32 * f64(x).norm(dim=-1, keepdim=True) + FUNCTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_the_dtype_and_an_empty_batch(device, dtype):
    out = hadamard(torch.empty((0, 32), dtype=dtype, device=device))
    assert (out.shape, out.dtype) == ((0, 32), dtype)


@pytest.mark.parametrize("dim", [3, 48, 96])
def test_other_sizes_are_refused(device, dim):
    with pytest.raises(ValueError, match=f"power of two, got {dim}"):
        hadamard(torch.zeros(2, dim, device=device))
