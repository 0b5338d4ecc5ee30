"""The compressor of CSA and HCA layers and of the indexer (docs/model.md, "Compressor")."""

from __future__ import annotations

import torch
from torch import nn

from ..kv_cache.layer_step import EntryCaches, LayerStep
from ..ops.compress import compress
from .linear import Projection
from .norm import RMSNorm


class Compressor(nn.Module):
    """Pools every `ratio` tokens into one entry of `dim` values; with overlap, over two windows.

    The attention multiplies its input by the weights `wkv` and `wgate`, along with its other projections.
    """

    def __init__(self, dim: int, ratio: int, *, overlap: bool, eps: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.width = 2 * dim if overlap else dim
        self.ape = nn.Parameter(torch.empty(ratio, self.width, dtype=torch.float32), requires_grad=False)
        self.norm = RMSNorm(dim, eps)

    def projections(self, name: str, label: str) -> list[Projection]:
        """Of the attention's input, with `name` the path to this module and `label` for the merged layer's name."""
        return [
            Projection(f"{name}.{leaf}", self.width, f"{label}{leaf.removeprefix('w')}", fp32=True)
            for leaf in ("wkv", "wgate")
        ]

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
            kv, gate: [T, dim], twice as wide with overlap; fp32, the attention's input times `wkv` and `wgate`.
            inv_freq: [R/2] fp32, the layer's frequencies.
            dtype: the model's.
        """
        compress(
            kv, gate, self.ape, self.norm.weight, inv_freq, step.positions, step.request,
            caches.states, caches.state_slots, caches.entries, ratio=self.ratio, eps=self.norm.eps, dtype=dtype,
        )  # fmt: skip
