"""The weighted sum of the residual streams that the final norm reads (docs/model.md, "Hyper-connections")."""

from __future__ import annotations

import torch

from .checks import check_dtype, check_shape
from .dispatch import op
from .mhc_pre import mhc_mixes


def _check(streams: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor) -> None:
    _, n, hidden = streams.shape
    check_shape("fn", fn, (n, n * hidden))
    check_shape("scale", scale, (1,))
    check_shape("base", base, (n,))
    check_dtype(torch.float32, fn=fn, scale=scale, base=base)


@op(_check)
def mhc_head(
    streams: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, *, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    """`sum_i (sigmoid(m[i] scale + base[i]) + hc_eps) streams[i]` with m as in `mhc_pre`; no Sinkhorn.

    Args:
        streams: [T, n, H], floating.
        fn: [n, n H] fp32.
        scale: [1] fp32.
        base: [n] fp32.

    Returns:
        [T, H], the dtype of `streams`.
    """
    pre = torch.sigmoid(mhc_mixes(streams, fn, norm_eps) * scale + base) + hc_eps
    return (pre[..., None] * streams.float()).sum(1).to(streams.dtype)
