"""The lightning indexer of CSA layers (docs/model.md, "Indexer")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..compat import ReplicatedLinear
from ..config import DeepseekV4Config
from ..kv_cache.layer_step import LayerStep
from ..ops.indexer_topk import indexer_topk
from .compressor import Compressor
from .linear import Projection


class Indexer(nn.Module):
    """Chooses the `index_topk` compressed entries that a token attends to; every rank computes all of it.

    The attention multiplies its input by the weight `weights_proj` and those of the compressor, along with its other
    projections.
    """

    def __init__(self, config: DeepseekV4Config, ratio: int, *, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.topk, self.ratio = config.index_topk, ratio
        self.wq_b = ReplicatedLinear(
            config.q_lora_rank, self.heads * self.dim, bias=False, quant_config=quant_config,
            prefix=f"{prefix}.wq_b", return_bias=False,
        )  # fmt: skip
        self.compressor = Compressor(self.dim, ratio, overlap=True, eps=config.rms_norm_eps)

    def projections(self, name: str) -> list[Projection]:
        """Of the attention's input, with `name` the path to this module."""
        return [
            Projection(f"{name}.weights_proj", self.heads, "iweights"),
            *self.compressor.projections(f"{name}.compressor", "i"),
        ]

    def forward(
        self, qr: torch.Tensor, weights: torch.Tensor, kv: torch.Tensor, gate: torch.Tensor, cos_sin: torch.Tensor,
        inv_freq: torch.Tensor, step: LayerStep,
    ) -> torch.Tensor | None:  # fmt: skip
        """Store the step's index keys and select entries.

        Args:
            qr: [T, q_lora_rank], the normed query latent.
            weights: [T, index_n_heads], the attention's input times `weights_proj`.
            kv, gate: [T, 2 * index_head_dim] fp32, the attention's input times the compressor's `wkv` and `wgate`.
            cos_sin: [T, R] fp32 at the tokens' positions.
            inv_freq: [R/2] fp32, the layer's frequencies.

        Returns:
            [T, topk] int32 entry indices, -1 for none; or None when every visible entry is selected anyway.
        """
        assert step.index is not None
        self.compressor(kv, gate, inv_freq, step, step.index, qr.dtype)
        if step.max_entries <= self.topk:
            return None
        q = self.wq_b(qr).view(-1, self.heads, self.dim)
        return indexer_topk(
            q, cos_sin, weights, step.index.entries, step.positions, step.request,
            ratio=self.ratio, topk=self.topk, max_entries=step.max_entries, scale=(self.dim * self.heads) ** -0.5,
        )  # fmt: skip
