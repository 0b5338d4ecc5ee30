"""Manifold-constrained hyper-connections, leaving a sublayer (docs/model.md, "Hyper-connections")."""

from __future__ import annotations

import torch

from .checks import check_dtype, check_shape
from .dispatch import op


def check_mhc_post(x: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> None:
    num_tokens, n, hidden = streams.shape
    check_shape("x", x, (num_tokens, hidden))
    check_shape("post", post, (num_tokens, n))
    check_shape("comb", comb, (num_tokens, n, n))
    check_dtype(torch.float32, post=post, comb=comb)


@op(check_mhc_post)
def mhc_post(x: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """`streams'[k] = post[k] x + sum_j comb[j, k] streams[j]`, in fp32, cast once.

    Args:
        x: [T, H] output of the sublayer.
        streams: [T, n, H], as they were before `mhc_pre`.
        post: [T, n] fp32.
        comb: [T, n, n] fp32, indexed [source, destination].

    Returns:
        [T, n, H], the dtype of `streams`.
    """
    mixed = torch.einsum("tjk,tjh->tkh", comb, streams.float())
    return (post[..., None] * x[:, None].float() + mixed).to(streams.dtype)
