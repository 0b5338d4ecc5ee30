"""Rotary frequencies against the formulas of docs/model.md, "RoPE", in Python floats."""

import math

import pytest
import torch

from testing.tiny import BASE
from vllm_deepseek_v4flash.config import DeepseekV4Config, LayerKind, RopeScaling
from vllm_deepseek_v4flash.layers.rotary import RotaryEmbedding, inverse_frequencies

FLASH_YARN = RopeScaling(factor=16, original_max_position_embeddings=65536)
U32 = 2.0**-24


def yarn(dim, theta, factor, original, fast=32, slow=1):
    def index_of(rotations):
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = max(math.floor(index_of(fast)), 0), min(math.ceil(index_of(slow)), dim - 1)
    out = []
    for k in range(dim // 2):
        frequency = theta ** (-2 * k / dim)
        ramp = min(max((k - low) / (high - low), 0.0), 1.0)
        out.append(frequency * (1 - ramp) + frequency / factor * ramp)
    return out


def assert_close(actual, expected, theta):
    # exp(ln(theta) * 2k / dim) in fp32: its argument is rounded, which counts ln(theta) times; a handful of operations
    # follow.
    bound = (2 * math.log(theta) + 12) * U32
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize(("dim", "theta"), [(64, 10000.0), (64, 160000.0), (32, 500.0), (20, 10000.0), (2, 10.0)])
def test_plain(dim, theta):
    assert_close(inverse_frequencies(dim, theta, None), [theta ** (-2 * k / dim) for k in range(dim // 2)], theta)


@pytest.mark.parametrize(
    ("dim", "theta", "factor", "original"),
    [(64, 160000.0, 16, 65536), (32, 160000.0, 16, 64), (64, 10000.0, 4, 4096), (20, 50000.0, 40, 1000)],
)
def test_yarn(dim, theta, factor, original):
    actual = inverse_frequencies(dim, theta, RopeScaling(factor, original))
    assert_close(actual, yarn(dim, theta, factor, original), theta)


def test_flash_keeps_15_frequencies_and_divides_those_from_25_on():
    plain, scaled = (inverse_frequencies(64, 160000.0, s) for s in (None, FLASH_YARN))
    ratio = (plain / scaled).tolist()
    assert ratio[:16] == [1.0] * 16
    assert ratio[25:] == [16.0] * 7
    assert ratio[15:26] == sorted(ratio[15:26])
    assert 1.0 < ratio[16] < ratio[24] < 16.0


def test_betas_move_the_ramp():
    actual = inverse_frequencies(64, 160000.0, RopeScaling(16, 65536, beta_fast=64, beta_slow=2))
    assert_close(actual, yarn(64, 160000.0, 16, 65536, fast=64, slow=2), 160000.0)


def test_a_ramp_of_no_width_is_a_step():
    # An original length of 1 puts both ends at index 0: everything above it is divided.
    actual = inverse_frequencies(8, 100.0, RopeScaling(10.0, 1))
    expected = [1.0] + [100.0 ** (-2 * k / 8) / 10 for k in range(1, 4)]
    assert_close(actual, expected, 100.0)


@pytest.fixture
def config():
    scaling = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
    return DeepseekV4Config.from_dict({**BASE, "rope_scaling": scaling})


def test_window_layers_use_their_own_theta_and_never_scale(config):
    dim = config.qk_rope_head_dim
    assert_close(
        RotaryEmbedding(config, LayerKind.WINDOW).inv_freq,
        [10000.0 ** (-2 * k / dim) for k in range(dim // 2)],
        10000.0,
    )


@pytest.mark.parametrize("kind", [LayerKind.CSA, LayerKind.HCA])
def test_compressed_layers_use_theirs_with_yarn(config, kind):
    expected = yarn(config.qk_rope_head_dim, 160000.0, 16, 64)
    assert_close(RotaryEmbedding(config, kind).inv_freq, expected, 160000.0)


def test_table_has_no_mscale_and_needs_no_weights(config):
    rotary = RotaryEmbedding(config, LayerKind.CSA)
    assert not list(rotary.state_dict())
    table = rotary(torch.tensor([0, 5, 1000]))
    cos, sin = table.double().chunk(2, dim=-1)
    # Each of cos and sin is within 4 ulp.
    assert (cos.square() + sin.square() - 1).abs().max() <= 32 * U32
    assert (cos[1] - torch.cos(5 * rotary.inv_freq.double())).abs().max() <= 5 * 2 * U32 + 8 * U32


def test_frequencies_do_not_depend_on_the_default_dtype(config):
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = RotaryEmbedding(config, LayerKind.HCA).inv_freq
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, RotaryEmbedding(config, LayerKind.HCA).inv_freq)
