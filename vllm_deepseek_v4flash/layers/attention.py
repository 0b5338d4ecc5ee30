"""Window, CSA and HCA attention: one module, three kinds of layer (docs/model.md, "Attention")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..compat import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    eager_break_during_capture,
    get_tensor_model_parallel_world_size,
)
from ..config import DeepseekV4Config, LayerKind
from ..kv_cache.layer_caches import LayerCaches, LayerStep
from ..ops.qnorm_rope_kv_insert import qnorm_rope_kv_insert
from ..ops.sparse_attention import sparse_attention
from .compressor import Compressor
from .indexer import Indexer
from .linear import GroupedLinear, Together, quick
from .norm import RMSNorm
from .parallel import shard_rows


class DeepseekV4Attention(nn.Module):
    """Low-rank queries, one shared key-value row per token, grouped low-rank output.

    Heads and output groups are split over the tensor-parallel ranks; everything that is computed once per token (kv
    rows, compressors, indexer) is computed on every rank.
    """

    def __init__(
        self, config: DeepseekV4Config, layer: int, caches: LayerCaches, *, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        kind, ratio = config.layer_kinds[layer], config.compress_ratios[layer]
        tp_size = get_tensor_model_parallel_world_size()
        if config.o_groups % tp_size:
            raise ValueError(
                f"--tensor-parallel-size {tp_size} must divide o_groups, {config.o_groups}: use one that does"
            )
        self.heads, self.groups = config.num_attention_heads // tp_size, config.o_groups // tp_size
        self.dim, self.window_size, self.ratio = config.head_dim, config.sliding_window, ratio
        self.scale, self.eps = config.head_dim**-0.5, config.rms_norm_eps
        hidden, q_rank = config.hidden_size, config.q_lora_rank
        plain: dict[str, Any] = {"bias": False, "quant_config": quant_config, "return_bias": False}

        self.wq_a = quick(ReplicatedLinear(hidden, q_rank, prefix=f"{prefix}.wq_a", **plain))
        self.q_norm = RMSNorm(q_rank, self.eps)
        self.wq_b = quick(
            ColumnParallelLinear(q_rank, config.num_attention_heads * self.dim, prefix=f"{prefix}.wq_b", **plain)
        )
        self.wkv = quick(ReplicatedLinear(hidden, self.dim, prefix=f"{prefix}.wkv", **plain))
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
        self.wo_b = quick(
            RowParallelLinear(
                config.o_groups * config.o_lora_rank, hidden, input_is_parallel=True, prefix=f"{prefix}.wo_b", **plain
            )
        )
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        if kind is not LayerKind.WINDOW:
            self.compressor = Compressor(
                hidden, self.dim, ratio, overlap=kind is LayerKind.CSA, eps=self.eps,
                quant_config=quant_config, prefix=f"{prefix}.compressor",
            )  # fmt: skip
        if kind is LayerKind.CSA:
            self.indexer = Indexer(config, ratio, quant_config=quant_config, prefix=f"{prefix}.indexer")
        compressors = [c for c in (self.compressor, self.indexer and self.indexer.compressor) if c is not None]
        self.project = Together(self.wq_a, self.wkv, *(linear for c in compressors for linear in (c.wkv, c.wgate)))
        self.caches = caches
        # Piecewise CUDA graphs stop before this and go on after it. vLLM's decorator asks once whether they are wanted,
        # and knows when the model is built.
        self.attend = eager_break_during_capture(self._attend)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, inv_freq: torch.Tensor
    ) -> torch.Tensor:
        """Attend and write the caches.

        Args:
            x: [T, hidden], normed. positions: [T] int64.
            cos_sin: [T, R] fp32 and inv_freq: [R/2] fp32, of this kind of layer.

        Returns:
            [T, hidden], the dtype of `x`.
        """
        o = x.new_empty(x.shape[0], self.heads, self.dim)
        self.attend(x, positions, cos_sin, inv_freq, o)
        return self.wo_b(self.wo_a(o.view(x.shape[0], self.groups, self.heads // self.groups * self.dim)))

    def _attend(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, inv_freq: torch.Tensor, o: torch.Tensor
    ) -> None:
        """Put what the tokens attend to into `o` [T, heads, head_dim], rotated back; zeros for padding.

        The caches, and with them the number of tokens, are those of the step in which this is called.
        """
        step = self.caches.step(positions)
        n = step.positions.shape[0]
        for small in self.caches.warm_up(positions):
            tokens = small.positions.shape[0]
            self._compute(x[:tokens], cos_sin[:tokens], inv_freq, small, o[:tokens])
        self._compute(x[:n], cos_sin[:n], inv_freq, step, o[:n])
        if n < x.shape[0]:
            o[n:].zero_()

    def _compute(
        self, x: torch.Tensor, cos_sin: torch.Tensor, inv_freq: torch.Tensor, step: LayerStep, o: torch.Tensor
    ) -> None:
        qr, kv, *states = self.project(x)
        qr, kv = self.q_norm(qr), self.kv_norm(kv)
        q = self.wq_b(qr).view(-1, self.heads, self.dim)
        q = qnorm_rope_kv_insert(q, kv, cos_sin, step.window, step.window_slots, eps=self.eps)
        entries = indices = None
        if self.compressor is not None:
            assert step.main is not None
            self.compressor(*states[:2], inv_freq, step, step.main, x.dtype)
            entries = step.main.entries
        if self.indexer is not None:
            indices = self.indexer(x, qr, *states[2:], cos_sin, inv_freq, step)
        sparse_attention(
            q, self.attn_sink, step.positions, step.request, step.window,
            window_size=self.window_size, scale=self.scale,
            entries=entries, indices=indices, ratio=self.ratio, max_entries=step.max_entries,
            cos_sin=cos_sin, out=o,
        )  # fmt: skip
