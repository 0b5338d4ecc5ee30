"""From one sublayer to the next (docs/model.md, "Hyper-connections"): `mhc_post` and `mhc_pre` in one op."""

import pytest
import torch

from testing.ops.mhc import OPTIONS, SHAPES, check_entered, entering, leaving
from testing.ops.numeric import U32, assert_exact, assert_within, f64
from vllm_deepseek_v4flash.ops.mhc_post import mhc_post
from vllm_deepseek_v4flash.ops.mhc_post_pre import mhc_post_pre
from vllm_deepseek_v4flash.ops.mhc_pre import mhc_pre


def problem(rng, device, *, norm=True, **shape):
    """(x, streams, post, comb) of one sublayer, (fn, scale, base, norm_weight) of the next."""
    return leaving(rng, device, **shape), entering(rng, device, norm=norm, **shape)[1:]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "hidden"), SHAPES)
def test_matches_the_formulas(device, rng, dtype, tokens, n, hidden, norm):
    leave, enter = problem(rng, device, tokens=tokens, n=n, hidden=hidden, dtype=dtype, norm=norm)
    result = mhc_post_pre(*leave, *enter, **OPTIONS)
    streams, entered = result[0], result[1:]
    x, before, post, comb = map(f64, leave)
    expected = post[:, :, None] * x[:, None] + torch.einsum("tjk,tjh->tkh", comb, before)
    size = (post[:, :, None] * x[:, None]).abs() + torch.einsum("tjk,tjh->tkh", comb.abs(), before.abs())
    assert streams.dtype == dtype
    assert_within(streams, expected, (n + 2) * U32 * size)
    # What the next sublayer reads are the streams as they are stored, rounded.
    check_entered(entered, streams, *enter, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_both_ops_in_turn(device, rng, dtype):
    """Several blocks of tokens, and several steps over the hidden dimension in each part of it."""
    leave, enter = problem(rng, device, tokens=70, n=4, hidden=200, dtype=dtype)
    streams, *entered = mhc_post_pre(*leave, *enter, **OPTIONS)
    assert_exact(streams, mhc_post(*leave))
    for actual, expected in zip(entered, mhc_pre(streams, *enter, **OPTIONS), strict=True):
        assert_exact(actual, expected)


def test_the_old_streams_are_left_alone(device, rng):
    leave, enter = problem(rng, device)
    before = leave[1].clone()
    streams, *_ = mhc_post_pre(*leave, *enter, **OPTIONS)
    assert_exact(leave[1], before)
    assert streams.data_ptr() != leave[1].data_ptr()


def test_runs_repeat_bit_for_bit(device, rng):
    leave, enter = problem(rng, device, tokens=20, hidden=100)
    first, second = (mhc_post_pre(*leave, *enter, **OPTIONS) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_exact(one, other)


def test_no_tokens(device, rng):
    leave, enter = problem(rng, device, tokens=0)
    streams, x, post, comb = mhc_post_pre(*leave, *enter, **OPTIONS)
    assert (streams.shape, x.shape, post.shape, comb.shape) == ((0, 4, 24), (0, 24), (0, 4), (0, 4, 4))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(5, 23), r"x must have shape \[5, 24\]"),
        ("post", torch.zeros(5, 3), r"post must have shape \[5, 4\]"),
        ("comb", torch.zeros(5, 4, 4).half(), "comb must be torch.float32"),
        ("fn", torch.zeros(23, 96), r"fn must have shape \[24, 96\]"),
        ("scale", torch.zeros(4), r"scale must have shape \[3\]"),
        ("base", torch.zeros(24).half(), "base must be torch.float32"),
        ("norm_weight", torch.ones(25), r"norm_weight must have shape \[24\]"),
        ("sinkhorn_iters", 0, "sinkhorn_iters must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(device, rng, name, value, message):
    leave, enter = problem(rng, device)
    names = ("x", "streams", "post", "comb", "fn", "scale", "base", "norm_weight")
    arguments = dict(zip(names, (*leave, *enter), strict=True)) | OPTIONS
    arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=message):
        mhc_post_pre(**arguments)
