"""The compressor of CSA and HCA layers and of the indexer (docs/model.md, "Compressor")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kv_cache.layer_caches import EntryCaches, LayerStep
from ..ops.compress import compress
from .linear import Fp32Linear
from .norm import RMSNorm


class Compressor(nn.Module):
    """Pools every `ratio` tokens into one entry of `dim` values; with overlap, over two windows."""

    def __init__(
        self, hidden_size: int, dim: int, ratio: int, *, overlap: bool, eps: float, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        self.ratio = ratio
        width = 2 * dim if overlap else dim
        self.wkv = Fp32Linear(hidden_size, width, quant_config=quant_config, prefix=f"{prefix}.wkv")
        self.wgate = Fp32Linear(hidden_size, width, quant_config=quant_config, prefix=f"{prefix}.wgate")
        self.ape = nn.Parameter(torch.empty(ratio, width, dtype=torch.float32), requires_grad=False)
        self.norm = RMSNorm(dim, eps)

    def forward(
        self,
        kv: torch.Tensor,
        gate: torch.Tensor,
        inv_freq: torch.Tensor,
        step: LayerStep,
        caches: EntryCaches,
        dtype: torch.dtype,
    ) -> None:
        """Store the step's states and the entries it completes.

        Args:
            kv, gate: [T, dim], twice as wide with overlap; fp32, what `wkv` and `wgate` make of the attention's input.
            inv_freq: [R/2] fp32, the layer's frequencies.
            dtype: the model's.
        """
        compress(
            kv, gate, self.ape, self.norm.weight, inv_freq, step.positions, step.request,
            caches.states, caches.state_slots, caches.entries, ratio=self.ratio, eps=self.norm.eps, dtype=dtype,
        )  # fmt: skip
