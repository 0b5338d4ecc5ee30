"""Interleaved rotary embedding of the last dimensions of a head (docs/model.md, "RoPE").

Not an op: the kernels rotate what they hold, and only references call this.
"""

from __future__ import annotations

import torch

from .checks import check_cos_sin


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Rotate the pairs (2k, 2k+1) of the last R dimensions of every head; the others pass through.

    Args:
        x: [T, D] or [T, H, D], floating.
        cos_sin: [T, R] fp32: the R/2 cosines of each token's position, then its R/2 sines.
        inverse: rotate back, as the attention output needs.

    Returns:
        The shape and dtype of `x`; the rotation itself is fp32.
    """
    check_cos_sin(cos_sin, x.shape[0], x.shape[-1])
    rope_dim = cos_sin.shape[1]
    cos, sin = cos_sin.chunk(2, dim=-1)
    if inverse:
        sin = -sin
    if x.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    even, odd = x[..., -rope_dim:].float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-rope_dim], rotated.to(x.dtype)), dim=-1)
