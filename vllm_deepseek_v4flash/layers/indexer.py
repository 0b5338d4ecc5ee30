"""The lightning indexer of CSA layers (docs/model.md, "Indexer")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..compat import ReplicatedLinear
from ..config import DeepseekV4Config
from ..kv_cache.layer_caches import LayerStep
from ..ops.indexer_topk import indexer_topk
from .compressor import Compressor
from .linear import quick


class Indexer(nn.Module):
    """Chooses the `index_topk` compressed entries that a token attends to; the whole of it on every rank."""

    def __init__(self, config: DeepseekV4Config, ratio: int, *, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.topk, self.ratio = config.index_topk, ratio
        self.wq_b = quick(ReplicatedLinear(
            config.q_lora_rank, self.heads * self.dim, bias=False, quant_config=quant_config,
            prefix=f"{prefix}.wq_b", return_bias=False,
        ))  # fmt: skip
        self.weights_proj = quick(ReplicatedLinear(
            config.hidden_size, self.heads, bias=False, quant_config=quant_config,
            prefix=f"{prefix}.weights_proj", return_bias=False,
        ))  # fmt: skip
        self.compressor = Compressor(
            config.hidden_size, self.dim, ratio, overlap=True, eps=config.rms_norm_eps,
            quant_config=quant_config, prefix=f"{prefix}.compressor",
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, qr: torch.Tensor, kv: torch.Tensor, gate: torch.Tensor, cos_sin: torch.Tensor,
        inv_freq: torch.Tensor, step: LayerStep,
    ) -> torch.Tensor | None:  # fmt: skip
        """Store the step's index keys and select entries.

        Args:
            x: [T, hidden], the attention's normed input. qr: [T, q_lora_rank], the normed query latent.
            kv, gate: [T, 2 * index_head_dim] fp32, what the compressor's `wkv` and `wgate` make of `x`.
            cos_sin: [T, R] fp32 at the tokens' positions.

        Returns:
            [T, topk] int32 entry indices, -1 for none; or None when every visible entry is selected anyway.
        """
        assert step.index is not None
        self.compressor(kv, gate, inv_freq, step, step.index, x.dtype)
        if step.max_entries <= self.topk:
            return None
        q = self.wq_b(qr).view(-1, self.heads, self.dim)
        return indexer_topk(
            q, cos_sin, self.weights_proj(x), step.index.entries, step.positions, step.request,
            ratio=self.ratio, topk=self.topk, max_entries=step.max_entries, scale=(self.dim * self.heads) ** -0.5,
        )  # fmt: skip
