from __future__ import annotations

import torch


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    rope_dim = cos_sin.shape[1]
    cos, sin = cos_sin.chunk(2, dim=-1)
    if inverse:
        sin = -sin
    if x.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    even, odd = x[..., -rope_dim:].float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-rope_dim], rotated.to(x.dtype)), dim=-1)
