"""Hyper-connections between two sublayers: leave one, enter the next (docs/model.md, "Hyper-connections")."""

from __future__ import annotations

import torch

from .dispatch import op
from .mhc_post import check_mhc_post, mhc_post
from .mhc_pre import check_mhc_pre, mhc_pre


def _check(
    x: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_weight: torch.Tensor | None,
    sinkhorn_iters: int,
) -> None:
    check_mhc_post(x, streams, post, comb)
    check_mhc_pre(streams, fn, scale, base, norm_weight, sinkhorn_iters)


@op(_check)
def mhc_post_pre(
    x: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`streams = mhc_post(x, streams, post, comb)`, then `mhc_pre(streams, fn, ...)`.

    Args:
        x, streams, post, comb: as for `mhc_post`.
        fn, scale, base, norm_weight, norm_eps, hc_eps, sinkhorn_iters: the next sublayer's, as for `mhc_pre`.

    Returns:
        The streams [T, n, H] after the first sublayer, and `mhc_pre`'s x [T, H], post [T, n] and comb [T, n, n].
    """
    streams = mhc_post.reference(x, streams, post, comb)
    return streams, *mhc_pre.reference(
        streams, fn, scale, base, norm_weight, norm_eps=norm_eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters
    )
