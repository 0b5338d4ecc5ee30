"""Leaving a sublayer (docs/model.md, "Hyper-connections")."""

import pytest
import torch

from testing.ops.mhc import leaving as problem
from testing.ops.numeric import U32, assert_exact, assert_within, f64
from vllm_deepseek_v4flash.ops.mhc_post import mhc_post


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "hidden"), [(5, 4, 24), (1, 4, 101), (3, 3, 16), (2, 1, 8), (67, 2, 70)])
def test_matches_the_formula_with_a_single_rounding(device, rng, dtype, tokens, n, hidden):
    x, streams, post, comb = problem(rng, device, tokens=tokens, n=n, hidden=hidden, dtype=dtype)
    actual = mhc_post(x, streams, post, comb)
    assert actual.dtype == dtype
    expected, size = torch.zeros(streams.shape, dtype=torch.float64), torch.zeros(streams.shape, dtype=torch.float64)
    for t in range(tokens):
        for k in range(n):
            terms = [f64(post)[t, k] * f64(x)[t]] + [f64(comb)[t, j, k] * f64(streams)[t, j] for j in range(n)]
            expected[t, k], size[t, k] = sum(terms), sum(term.abs() for term in terms)
    assert_within(actual, expected, (n + 2) * U32 * size)


def test_comb_moves_a_stream_from_its_first_index_to_its_second(device, rng):
    x, streams, post, comb = problem(rng, device, tokens=1)
    post, comb = torch.zeros_like(post), torch.zeros_like(comb)
    comb[0, 1, 3] = 1.0
    actual = mhc_post(x, streams, post, comb)
    assert_exact(actual[0, 3], streams[0, 1])
    assert not actual[0, :3].any()


def test_everything_may_be_strided(device, rng):
    x, streams, post, comb = problem(rng, device)
    given = (
        torch.stack((x, x + 1), dim=2).flatten(1)[:, ::2],
        torch.cat((streams, streams + 1), dim=2)[..., : streams.shape[2]],
        torch.cat((post, post + 1), dim=1)[:, : post.shape[1]],
        comb.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not any(tensor.is_contiguous() for tensor in given)
    assert_exact(mhc_post(*given), mhc_post(x, streams, post, comb))


def test_streams_are_left_alone(device, rng):
    arguments = problem(rng, device)
    before = arguments[1].clone()
    mhc_post(*arguments)
    assert_exact(arguments[1], before)


def test_no_tokens(device, rng):
    assert mhc_post(*problem(rng, device, tokens=0)).shape == (0, 4, 24)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(5, 23), r"x must have shape \[5, 24\]"),
        ("post", torch.zeros(5, 3), r"post must have shape \[5, 4\]"),
        ("comb", torch.zeros(5, 4, 3), r"comb must have shape \[5, 4, 4\]"),
        ("comb", torch.zeros(5, 4, 4).bfloat16(), "comb must be torch.float32"),
        ("post", torch.zeros(5, 4).bfloat16(), "post must be torch.float32"),
    ],
)
def test_wrong_arguments_are_named(device, rng, name, value, message):
    arguments = dict(zip(("x", "streams", "post", "comb"), problem(rng, device), strict=True))
    arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        mhc_post(**arguments)
