"""Rotary frequencies: plain for window layers, YaRN for compressed ones (docs/model.md, "RoPE")."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import DeepseekV4Config, LayerKind, RopeScaling
from ..ops.rope_table import rope_table


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """[dim/2] fp32, radians per token.

    YaRN divides the slow frequencies by `factor`, keeps the fast ones and blends linearly between them, at every
    position. V4 has no mscale.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    freq = 1.0 / theta**exponents
    if scaling is None:
        return freq

    def index_of(rotations: float) -> float:
        """The (fractional) frequency index that turns this often within the original context."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), dim - 1)
    # With both ends on one index the blend is a step; 0.001 keeps the division defined.
    span = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    return freq / scaling.factor * ramp + freq * (1 - ramp)


class RotaryEmbedding(nn.Module):
    """The frequencies of a kind of layer, the same for q, window rows, entries, indexer and output."""

    def __init__(self, config: DeepseekV4Config, kind: LayerKind) -> None:
        super().__init__()
        if kind is LayerKind.WINDOW:
            freq = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, None)
        else:
            freq = inverse_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling)
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", freq.to(torch.get_default_device()), persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[T] integer to [T, R] fp32, cosines then sines."""
        return rope_table(positions, self.inv_freq)
