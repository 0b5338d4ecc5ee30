"""Hyper-connections between two sublayers: leave one, enter the next (docs/model.md, "Hyper-connections")."""

from __future__ import annotations

import torch

from .checks import check_dtype, check_shape
from .dispatch import implementation


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
    num_tokens, n, hidden = streams.shape
    check_shape("x", x, (num_tokens, hidden))
    check_shape("post", post, (num_tokens, n))
    check_shape("comb", comb, (num_tokens, n, n))
    check_shape("fn", fn, ((2 + n) * n, n * hidden))
    check_shape("scale", scale, (3,))
    check_shape("base", base, ((2 + n) * n,))
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, (hidden,))
    for name, tensor in (("post", post), ("comb", comb), ("fn", fn), ("scale", scale), ("base", base)):
        check_dtype(name, tensor, torch.float32)
    if sinkhorn_iters < 1:
        raise ValueError(f"sinkhorn_iters must be at least 1, got {sinkhorn_iters}")
    return implementation("mhc_post_pre", streams.device)(
        x, streams, post, comb, fn, scale, base, norm_weight,
        norm_eps=norm_eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters,
    )  # fmt: skip
