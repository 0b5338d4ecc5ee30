"""Mixture of experts: router, routed experts, shared expert (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..compat import (
    RowParallelLinear,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from ..config import DeepseekV4Config
from ..log import info_once, logger_name
from ..ops.route import route
from ..ops.swiglu import swiglu
from .linear import Fp32Linear, Projection
from .methods import Schemes, why_not_fused
from .projections import Projections

logger = logging.getLogger(logger_name(__name__))


class Router(Fp32Linear):
    """Scores in fp32; the first `num_hash_layers` layers choose by token id, the others by biased top-k.

    With `shared`, every token's list ends with the shared expert, number `n_routed_experts`, and its weight 1.
    """

    def __init__(self, config: DeepseekV4Config, layer: int, *, shared: bool, quant_config: Any, prefix: str) -> None:
        super().__init__(config.hidden_size, config.n_routed_experts, quant_config=quant_config, prefix=prefix)
        self.topk, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.renormalize, self.shared = config.norm_topk_prob, shared
        self.hashed = layer < config.num_hash_layers
        if self.hashed:
            # `--load-format dummy` fills floats only, so this must be a valid table from the start.
            table = torch.arange(config.vocab_size * self.topk, dtype=torch.int32) % config.n_routed_experts
            self.tid2eid = nn.Parameter(table.view(config.vocab_size, self.topk), requires_grad=False)
        else:
            bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to the scores' logits, [T, n_routed_experts] fp32."""
        # vLLM's forward would add `bias`, which is only for the choice of experts.
        return self.quant_method.apply(self, x)

    def select(self, x: torch.Tensor, input_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden] and token ids [T] to weights [T, K] fp32 and expert indices [T, K] int64."""
        expert_ids = None
        if self.hashed:
            if input_ids is None:
                raise ValueError(
                    "prompt embeddings: hash-routed layers need token ids. Give the prompt as text or tokens."
                )
            expert_ids = self.tid2eid[input_ids]
        return route(
            self(x), self.topk, bias=None if self.hashed else self.bias, expert_ids=expert_ids,
            scaling=self.scaling, renormalize=self.renormalize, shared=self.shared,
        )  # fmt: skip


class RoutedExperts(nn.Module):
    """The routed experts' weights, stacked; `methods.py` decides how they are stored.

    With tensor parallelism every rank holds a slice of each expert's I; with expert parallelism, whole experts. With
    `shared`, which expert parallelism excludes, the shared expert is one more, after the routed ones.
    """

    def __init__(
        self, config: DeepseekV4Config, *, expert_parallel: bool, shared: bool, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        tp_size, tp_rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        experts, inner = config.n_routed_experts, config.moe_intermediate_size
        split, what = (experts, "n_routed_experts") if expert_parallel else (inner, "moe_intermediate_size")
        if split % tp_size:
            raise ValueError(f"--tensor-parallel-size={tp_size}: does not divide {what}={split}. Use a size that does.")
        self.limit = config.swiglu_limit
        self.local_experts = experts // tp_size if expert_parallel else experts + shared
        self.first_expert = tp_rank * self.local_experts if expert_parallel else 0
        self.full_inner = inner
        self.inner = inner if expert_parallel else inner // tp_size
        self.inner_rank = 0 if expert_parallel else tp_rank
        self.quant_method = quant_config.get_quant_method(self, prefix)
        self.quant_method.create_weights(self, config.hidden_size)

    @property
    def held(self) -> range:
        """The global numbers of this rank's experts."""
        return range(self.first_expert, self.first_expert + self.local_experts)

    def place(self, param: nn.Parameter, expert_id: int) -> torch.Tensor | None:
        """The part of a stacked parameter that belongs to a global expert; None if another rank holds it."""
        expert = expert_id - self.first_expert
        return param.data[expert] if 0 <= expert < self.local_experts else None

    def forward(self, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        """[T, H] to this rank's part of the sum, [T, H] fp32."""
        return self.quant_method.apply(self, x, weights, expert_ids)


class SharedExpert(nn.Module):
    """The expert that every token visits, with the same clamp and weight 1."""

    def __init__(self, config: DeepseekV4Config, *, quant_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.project = Projections(
            self, hidden, [Projection("w1", inner, "w1"), Projection("w3", inner, "w3")],
            column_parallel=True, merged_name="gate_up_proj", quant_config=quant_config, prefix=prefix,
        )  # fmt: skip
        self.w2 = RowParallelLinear(
            inner, hidden, bias=False, input_is_parallel=True, reduce_results=False, quant_config=quant_config,
            prefix=f"{prefix}.w2", return_bias=False,
        )  # fmt: skip
        self.limit = config.swiglu_limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] to this rank's part of the output, [T, H], same dtype."""
        parts = self.project(x)
        return self.w2(swiglu(parts["w1"], parts["w3"], self.limit).to(x.dtype))


def shared_is_fused(schemes: Schemes, expert_parallel: bool, prefix: str) -> bool:
    """Whether a layer's shared expert is computed as one more of the routed experts, in the same launches.

    That takes weights packed in the same way, and every expert on every rank.
    """
    reason = "ranks hold different experts" if expert_parallel else why_not_fused(schemes, prefix)
    if reason is None:
        info_once(logger, "Shared experts run as one more of the routed experts, which are packed in the same way.")
    else:
        info_once(logger, "Shared experts run separately from the routed ones: %s.", reason)
    return reason is None


class MoE(nn.Module):
    """Routed experts plus the shared one, summed in fp32."""

    def __init__(
        self, config: DeepseekV4Config, layer: int, *, expert_parallel: bool, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        expert_parallel = expert_parallel and get_tensor_model_parallel_world_size() > 1
        shared = shared_is_fused(quant_config.schemes, expert_parallel, prefix)
        self.gate = Router(config, layer, shared=shared, quant_config=quant_config, prefix=f"{prefix}.gate")
        self.experts = RoutedExperts(
            config, expert_parallel=expert_parallel, shared=shared, quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )  # fmt: skip
        self.shared_experts = None
        if not shared:
            self.shared_experts = SharedExpert(config, quant_config=quant_config, prefix=f"{prefix}.shared_experts")

    def forward(self, x: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """[T, H] normed, token ids [T] for the hash layers; to [T, H], same dtype."""
        weights, expert_ids = self.gate.select(x, input_ids)
        out = self.experts(x, weights, expert_ids)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x).float()
        return tensor_model_parallel_all_reduce(out).to(x.dtype)
