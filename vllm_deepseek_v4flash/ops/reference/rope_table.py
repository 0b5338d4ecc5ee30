from __future__ import annotations

import torch


def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    angles = positions[:, None].float() * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
