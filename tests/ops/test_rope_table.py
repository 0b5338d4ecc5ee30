"""The table of cosines and sines (docs/model.md, "RoPE")."""

import numpy
import pytest
import torch

from testing.ops.numeric import U32, f64
from vllm_deepseek_v4flash.ops.rope_table import rope_table

# The angle is exact, so only the function rounds: values of at most 1, to 4 ulp of the half below it.
BOUND = 4 * U32


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_angles_are_fp32_products_up_to_a_million(device, dtype):
    positions = torch.tensor([0, 1, 2, 127, 128, 65535, 65537, 999_983, 2**20 - 1], dtype=dtype, device=device)
    inv_freq = torch.tensor([1.0, 0.7310, 0.017, 1.3e-4, 6.6e-7], device=device)
    actual = rope_table(positions, inv_freq)
    assert (actual.dtype, tuple(actual.shape)) == (torch.float32, (9, 10))
    angles = positions.cpu().numpy().astype(numpy.float32)[:, None] * inv_freq.cpu().numpy()
    assert angles.dtype == numpy.float32
    exact = angles.astype(numpy.float64)
    expected = torch.from_numpy(numpy.concatenate((numpy.cos(exact), numpy.sin(exact)), axis=1))
    assert (f64(actual) - expected).abs().max() <= BOUND


def test_every_token_of_a_long_batch(device, rng):
    """More tokens than one program takes, every other one of a longer tensor."""
    positions = torch.randint(0, 2**20, (600,), generator=rng).to(device)[::2]
    inv_freq = torch.tensor([1.0, 0.31, 0.017, 0.001, 2e-5], device=device)
    exact = (f64(positions).float()[:, None] * inv_freq.cpu()).double()
    expected = torch.cat((exact.cos(), exact.sin()), -1)
    assert (f64(rope_table(positions, inv_freq)) - expected).abs().max() <= BOUND


def test_position_zero_does_not_rotate(device):
    actual = rope_table(torch.zeros(2, dtype=torch.int64, device=device), torch.tensor([1.0, 0.1], device=device))
    assert actual.cpu().tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2


def test_no_tokens(device):
    empty = rope_table(torch.zeros(0, dtype=torch.int64, device=device), torch.ones(3, device=device))
    assert tuple(empty.shape) == (0, 6)
