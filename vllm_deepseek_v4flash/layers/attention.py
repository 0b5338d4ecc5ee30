"""Window, CSA and HCA attention: one module, three kinds of layer (docs/model.md, "Attention")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..compat import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_tensor_model_parallel_world_size,
)
from ..config import DeepseekV4Config, LayerKind
from ..kv_cache.layer_step import LayerStep
from ..ops.qnorm_rope_kv_insert import qnorm_rope_kv_insert
from ..ops.sparse_attention import sparse_attention
from .compressor import Compressor
from .indexer import Indexer
from .linear import GroupedLinear, Projection
from .norm import RMSNorm
from .parallel import shard_rows
from .projections import Projections


class DeepseekV4Attention(nn.Module):
    """Low-rank queries, one shared key-value row per token, grouped low-rank output.

    Heads and output groups are split over the tensor-parallel ranks; everything that is computed once per token (kv
    rows, compressors, indexer) is computed on every rank.
    """

    def __init__(self, config: DeepseekV4Config, layer: int, *, quant_config: Any, prefix: str) -> None:
        super().__init__()
        kind, ratio = config.layer_kinds[layer], config.compress_ratios[layer]
        tp_size = get_tensor_model_parallel_world_size()
        if config.o_groups % tp_size:
            raise ValueError(
                f"--tensor-parallel-size={tp_size}: does not divide o_groups={config.o_groups}. Use a size that does."
            )
        self.heads, self.groups = config.num_attention_heads // tp_size, config.o_groups // tp_size
        self.dim, self.window_size, self.ratio = config.head_dim, config.sliding_window, ratio
        self.scale, self.eps = config.head_dim**-0.5, config.rms_norm_eps
        hidden, q_rank = config.hidden_size, config.q_lora_rank
        plain: dict[str, Any] = {"bias": False, "quant_config": quant_config, "return_bias": False}

        self.q_norm = RMSNorm(q_rank, self.eps)
        self.wq_b = ColumnParallelLinear(
            q_rank, config.num_attention_heads * self.dim, prefix=f"{prefix}.wq_b", **plain
        )
        self.kv_norm = RMSNorm(self.dim, self.eps)
        self.attn_sink = nn.Parameter(torch.empty(self.heads, dtype=torch.float32), requires_grad=False)
        shard_rows(self.attn_sink)
        self.wo_a = GroupedLinear(
            config.o_groups,
            config.num_attention_heads // config.o_groups * self.dim,
            config.o_lora_rank,
            quant_config=quant_config,
            prefix=f"{prefix}.wo_a",
        )
        self.wo_b = RowParallelLinear(
            config.o_groups * config.o_lora_rank, hidden, input_is_parallel=True, prefix=f"{prefix}.wo_b", **plain
        )
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        projections = [Projection("wq_a", q_rank, "wqa"), Projection("wkv", self.dim, "wkv")]
        if kind is LayerKind.CSA:
            self.indexer = Indexer(config, ratio, quant_config=quant_config, prefix=f"{prefix}.indexer")
            projections += self.indexer.projections("indexer")
        if kind is not LayerKind.WINDOW:
            self.compressor = Compressor(self.dim, ratio, overlap=kind is LayerKind.CSA, eps=self.eps)
            projections += self.compressor.projections("compressor", "c")
        self.project = Projections(self, hidden, projections, quant_config=quant_config, prefix=prefix)

    def attend(
        self, x: torch.Tensor, cos_sin: torch.Tensor, inv_freq: torch.Tensor, step: LayerStep, out: torch.Tensor
    ) -> None:
        """Write the step's rows into the caches, and what its T tokens attend to into `out`.

        Args:
            x: [T, hidden], normed.
            cos_sin: [T, R] fp32 and inv_freq: [R/2] fp32, of this kind of layer.
            out: [T, local heads, head_dim], rotated back.
        """
        parts = self.project(x)
        qr, kv = parts["wq_a"], parts["wkv"]
        qr, kv = self.q_norm(qr), self.kv_norm(kv)
        q = self.wq_b(qr).view(-1, self.heads, self.dim)
        q = qnorm_rope_kv_insert(q, kv, cos_sin, step.window, step.window_slots, eps=self.eps)
        entries = indices = None
        if self.compressor is not None:
            assert step.main is not None
            self.compressor(parts["compressor.wkv"], parts["compressor.wgate"], inv_freq, step, step.main, x.dtype)
            entries = step.main.entries
        if self.indexer is not None:
            indices = self.indexer(
                qr, parts["indexer.weights_proj"], parts["indexer.compressor.wkv"], parts["indexer.compressor.wgate"],
                cos_sin, inv_freq, step,
            )  # fmt: skip
        sparse_attention(
            q, self.attn_sink, step.positions, step.request, step.window,
            window_size=self.window_size, scale=self.scale,
            entries=entries, indices=indices, ratio=self.ratio, max_entries=step.max_entries,
            cos_sin=cos_sin, out=out,
        )  # fmt: skip

    def project_out(self, o: torch.Tensor) -> torch.Tensor:
        """[T, local heads, head_dim] from `attend` to [T, hidden], same dtype."""
        return self.wo_b(self.wo_a(o.view(o.shape[0], self.groups, self.heads // self.groups * self.dim)))
