from __future__ import annotations

import torch


def mhc_post(x: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    mixed = torch.einsum("tjk,tjh->tkh", comb, streams.float())
    return (post[..., None] * x[:, None].float() + mixed).to(streams.dtype)
