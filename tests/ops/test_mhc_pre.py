"""Entering a sublayer (docs/model.md, "Hyper-connections")."""

import pytest
import torch

from testing.ops.mhc import OPTIONS, SHAPES, check_entered, sigmoid
from testing.ops.mhc import entering as problem
from testing.ops.numeric import FUNCTION, U32, assert_exact, f64
from vllm_deepseek_v4flash.ops.mhc_pre import mhc_pre


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "hidden"), SHAPES)
def test_matches_the_formula(device, rng, dtype, tokens, n, hidden, norm):
    arguments = problem(rng, device, tokens=tokens, n=n, hidden=hidden, dtype=dtype, norm=norm)
    check_entered(mhc_pre(*arguments, **OPTIONS), *arguments, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_have_every_bit_of_fp32(device, dtype):
    """A difference in the last bits of `fn` is made visible by a base that takes the rest away."""
    n, hidden = 4, 16
    streams = torch.zeros(1, n, hidden, device=device, dtype=dtype)
    streams[0, 2, 5] = 8.0  # the mean of squares is 1, and so is its inverse root
    fn = torch.zeros((2 + n) * n, n * hidden, device=device)
    fn[n : 2 * n, 2 * hidden + 5] = 1 + 2**-9 + 2**-23
    scale, base = torch.full((3,), 2.0**20, device=device), torch.zeros((2 + n) * n, device=device)
    base[n : 2 * n] = -(2.0**23) * (1 + 2**-9)
    _, post, _ = mhc_pre(streams, fn, scale, base, None, **{**OPTIONS, "norm_eps": 1e-30})
    # 2^23 (fn - 1 - 2^-9), and no step on the way to it rounds.
    assert (f64(post) - 2 * sigmoid(1)).abs().max() <= 2 * FUNCTION


def test_streams_and_weights_may_be_strided(device, rng):
    streams, fn, scale, base, norm_weight = problem(rng, device, norm=True)
    others = fn, scale, base, norm_weight
    wide = torch.stack((streams, streams + 1), dim=3).flatten(2)[:, :, ::2]  # every other value
    strided = torch.cat((streams, streams + 1), dim=2)[..., : streams.shape[2]]  # rows of a wider tensor
    same = streams[:, :1].expand(streams.shape)  # one stream four times
    for given, plain in ((wide, streams), (strided, streams), (same, same.contiguous())):
        assert not given.is_contiguous()
        for actual, expected in zip(
            mhc_pre(given, *others, **OPTIONS), mhc_pre(plain, *others, **OPTIONS), strict=True
        ):
            assert_exact(actual, expected)


@pytest.mark.parametrize("iters", [1, 2, 3, 20])
@pytest.mark.parametrize(("norm_eps", "hc_eps"), [(1e-6, 0.05), (0.6, 1e-6), (0.6, 0.05)])
def test_large_epsilons_show_where_they_are_added(device, rng, norm_eps, hc_eps, iters):
    # A base far from uniform keeps the steps from converging early, so that each of them shows.
    arguments = problem(rng, device, base=3.0)
    options = {"norm_eps": norm_eps, "hc_eps": hc_eps, "sinkhorn_iters": iters}
    check_entered(mhc_pre(*arguments, **options), *arguments, **options)


def test_columns_are_the_last_step(device, rng):
    arguments = problem(rng, device, base=3.0)
    _, _, comb = mhc_pre(*arguments, **{**OPTIONS, "hc_eps": 1e-12, "sinkhorn_iters": 2})
    # A quotient by the sum of 4 terms: its roundings and those of the sum.
    assert (f64(comb).sum(1) - 1).abs().max() <= 10 * U32 + FUNCTION
    assert (f64(comb).sum(2) - 1).abs().max() > 1e-3


def test_comb_is_indexed_source_then_destination(device):
    """With no input only the base speaks: a base that sends stream 0 to stream 2 does so in comb[0, 2]."""
    n, hidden = 4, 8
    streams = torch.ones(1, n, hidden, device=device)
    base = torch.full((n, n), -20.0)
    for source, destination in ((0, 2), (1, 0), (2, 3), (3, 1)):
        base[source, destination] = 20.0
    base = torch.cat((torch.zeros(2 * n), base.flatten())).to(device)
    fn = torch.zeros((2 + n) * n, n * hidden, device=device)
    _, _, comb = mhc_pre(streams, fn, torch.ones(3, device=device), base, None, **OPTIONS)
    assert comb[0].round().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]


def test_post_is_twice_the_sigmoid_and_pre_is_not(device):
    n, hidden = 4, 8
    streams = torch.ones(1, n, hidden, device=device)
    fn, base = torch.zeros((2 + n) * n, n * hidden, device=device), torch.zeros((2 + n) * n, device=device)
    x, post, _comb = mhc_pre(streams, fn, torch.ones(3, device=device), base, None, **{**OPTIONS, "hc_eps": 0.25})
    assert post.tolist() == [[1.0] * n]
    assert x.tolist() == [[n * (0.5 + 0.25)] * hidden]


def test_extreme_bases_stay_finite(device, rng):
    streams, fn, scale, base, _ = problem(rng, device)
    for x in mhc_pre(streams, fn, scale, base * 100, None, **OPTIONS):
        assert x.isfinite().all()


def test_no_tokens(device, rng):
    x, post, comb = mhc_pre(*problem(rng, device, tokens=0), **OPTIONS)
    assert (x.shape, post.shape, comb.shape) == ((0, 24), (0, 4), (0, 4, 4))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fn", torch.zeros(23, 96), r"fn must have shape \[24, 96\], got \[23, 96\]"),
        ("fn", torch.zeros(24, 96).bfloat16(), "fn must be torch.float32"),
        ("scale", torch.zeros(4), r"scale must have shape \[3\]"),
        ("base", torch.zeros(4), r"base must have shape \[24\]"),
        ("base", torch.zeros(24).half(), "base must be torch.float32"),
        ("norm_weight", torch.ones(25), r"norm_weight must have shape \[24\]"),
        ("sinkhorn_iters", 0, "sinkhorn_iters must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(device, rng, name, value, message):
    arguments = (
        dict(zip(("streams", "fn", "scale", "base", "norm_weight"), problem(rng, device), strict=True)) | OPTIONS
    )
    arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=message):
        mhc_pre(**arguments)
