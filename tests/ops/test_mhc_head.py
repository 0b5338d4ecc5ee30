"""The streams' sum before the final norm (docs/model.md, "Hyper-connections")."""

from typing import Any

import pytest
import torch

from testing.ops import mhc as mhc_oracle
from testing.ops.mhc import sigmoid
from testing.ops.numeric import FUNCTION, U32, assert_exact, assert_within, f64, normal
from vllm_deepseek_v4flash.ops.mhc_head import mhc_head


def problem(rng, device, *, tokens=5, n=4, hidden=24, dtype=torch.float32):
    streams = normal(rng, tokens, n, hidden, device=device, dtype=dtype)
    fn = normal(rng, n, n * hidden, scale=(n * hidden) ** -0.5, device=device)
    return streams, fn, torch.tensor([1.3], device=device), normal(rng, n, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "hidden"), [(5, 4, 24), (1, 4, 100), (3, 3, 16), (2, 1, 8), (67, 2, 40)])
@pytest.mark.parametrize(("norm_eps", "hc_eps"), [(1e-6, 1e-6), (0.6, 0.05)])
def test_matches_the_formula(device, rng, dtype, tokens, n, hidden, norm_eps, hc_eps):
    streams, fn, scale, base = problem(rng, device, tokens=tokens, n=n, hidden=hidden, dtype=dtype)
    actual = mhc_head(streams, fn, scale, base, norm_eps=norm_eps, hc_eps=hc_eps)
    assert (actual.dtype, tuple(actual.shape)) == (dtype, (tokens, hidden))
    s, b = scale.item(), f64(base).tolist()
    for t in range(tokens):
        m, error = mhc_oracle.mixes(streams[t], fn, norm_eps)
        pre = [sigmoid(m[i] * s + b[i]) + hc_eps for i in range(n)]
        # A sigmoid changes by at most a quarter of its argument's error; the argument itself is rounded twice.
        moved = max(abs(s) * e + 2 * U32 * (abs(m[i] * s) + abs(b[i])) for i, e in enumerate(error)) / 4
        expected, size = mhc_oracle.weighted_sum(pre, streams[t])
        assert_within(actual[t], expected, moved * f64(streams[t]).abs().sum(0) + ((n + 1) * U32 + FUNCTION) * size)


def test_streams_may_be_strided(device, rng):
    streams, *others = problem(rng, device)
    strided = torch.cat((streams, streams + 1), dim=2)[..., : streams.shape[2]]
    assert not strided.is_contiguous()
    options: dict[str, Any] = {"norm_eps": 1e-6, "hc_eps": 1e-6}
    assert_exact(mhc_head(strided, *others, **options), mhc_head(streams, *others, **options))


def test_no_tokens(device, rng):
    assert mhc_head(*problem(rng, device, tokens=0), norm_eps=1e-6, hc_eps=1e-6).shape == (0, 24)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fn", torch.zeros(4, 95), r"fn must have shape \[4, 96\]"),
        ("scale", torch.zeros(3), r"scale must have shape \[1\]"),
        ("base", torch.zeros(3), r"base must have shape \[4\]"),
        ("scale", torch.zeros(1).bfloat16(), "scale must be torch.float32"),
    ],
)
def test_wrong_arguments_are_named(device, rng, name, value, message):
    arguments = dict(zip(("streams", "fn", "scale", "base"), problem(rng, device), strict=True))
    arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        mhc_head(**arguments, norm_eps=1e-6, hc_eps=1e-6)
