"""Manifold-constrained hyper-connections around a sublayer (spec section 3.3)."""

from __future__ import annotations

import torch
from torch import nn

from ..config import DeepseekV4Config


def mixing_parameters(owner: nn.Module, name: str, config: DeepseekV4Config, *, head: bool = False) -> None:
    """Register fp32 `<name>_fn`, `<name>_scale` and `<name>_base` on `owner`, under the checkpoint's names."""
    n = config.hc_mult
    outputs = n if head else (2 + n) * n
    for leaf, shape in (
        ("fn", (outputs, n * config.hidden_size)),
        ("scale", (1 if head else 3,)),
        ("base", (outputs,)),
    ):
        owner.register_parameter(
            f"{name}_{leaf}", nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        )
