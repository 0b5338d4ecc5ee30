"""Mixture of experts: router, routed experts, shared expert (docs/model.md, "Mixture of experts")."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from ..compat import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from ..config import DeepseekV4Config
from ..log import logger_name
from ..ops.fused_experts import fused_experts
from ..ops.route import route
from ..ops.swiglu import swiglu
from .linear import Fp32Linear, Together, quick, shortest
from .methods import UnquantizedExpertsMethod, packed_apart

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
            table = torch.empty(config.vocab_size, self.topk, dtype=torch.int32)
            self.tid2eid = nn.Parameter(table, requires_grad=False)
        else:
            bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)

    def select(self, x: torch.Tensor, input_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden] and token ids [T] to weights [T, K] fp32 and expert indices [T, K] int64."""
        expert_ids = None
        if self.hashed:
            if input_ids is None:
                raise ValueError("hash-routed layers need token ids: prompts given as embeddings cannot be served")
            expert_ids = self.tid2eid[input_ids]
        return route(
            self(x), self.topk, bias=None if self.hashed else self.bias, expert_ids=expert_ids,
            scaling=self.scaling, renormalize=self.renormalize, shared=self.shared,
        )  # fmt: skip


class ExpertsMethod(UnquantizedExpertsMethod):
    """Keeps small experts' weights as short as they can be kept."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.plain_weights = shortest(layer.w13_weight.data), shortest(layer.w2_weight.data)

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        w13, w2 = layer.plain_weights
        return fused_experts(x, w13, w2, weights, expert_ids, swiglu_limit=layer.limit, first_expert=layer.first_expert)


class RoutedExperts(nn.Module):
    """The routed experts' weights, stacked; how they are stored is the quantisation method's affair.

    With tensor parallelism every rank holds a slice of each expert's I; with expert parallelism, whole experts. With
    `shared`, which expert parallelism excludes, the shared expert is one more, behind the routed ones.
    """

    def __init__(
        self, config: DeepseekV4Config, *, expert_parallel: bool, shared: bool, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        tp_size, tp_rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        experts, inner = config.n_routed_experts, config.moe_intermediate_size
        split, what = (experts, "n_routed_experts") if expert_parallel else (inner, "moe_intermediate_size")
        if split % tp_size:
            raise ValueError(f"--tensor-parallel-size {tp_size} must divide {what}, {split}: use one that does")
        self.limit = config.swiglu_limit
        self.local_experts = experts // tp_size if expert_parallel else experts + shared
        self.first_expert = tp_rank * self.local_experts if expert_parallel else 0
        self.full_inner = inner
        self.inner = inner if expert_parallel else inner // tp_size
        self.inner_rank = 0 if expert_parallel else tp_rank
        method = None if quant_config is None else quant_config.get_quant_method(self, prefix)
        if method is None or type(method) is UnquantizedExpertsMethod:
            method = ExpertsMethod()
        self.quant_method = method
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
        plain: dict[str, Any] = {"bias": False, "quant_config": quant_config, "return_bias": False}
        self.w1 = quick(ColumnParallelLinear(hidden, inner, prefix=f"{prefix}.w1", **plain))
        self.w3 = quick(ColumnParallelLinear(hidden, inner, prefix=f"{prefix}.w3", **plain))
        self.w2 = quick(
            RowParallelLinear(
                inner, hidden, input_is_parallel=True, reduce_results=False, prefix=f"{prefix}.w2", **plain
            )
        )
        self.project = Together(self.w1, self.w3)
        self.limit = config.swiglu_limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] to this rank's part of the output, [T, H], same dtype."""
        gate, up = self.project(x)
        return self.w2(swiglu(gate, up, self.limit).to(x.dtype))


def rides_along(quant_config: Any, expert_parallel: bool, prefix: str) -> bool:
    """Whether a layer's shared expert is computed as one more of the routed experts, in the same launches.

    That takes weights packed alike, and every expert on every rank.
    """
    if expert_parallel:
        apart: str | None = "ranks hold different experts"
    else:
        apart = packed_apart(getattr(quant_config, "plan", {}), prefix)
    _tell(apart)
    return apart is None


@functools.cache
def _tell(apart: str | None) -> None:
    """Once for all layers of a kind."""
    if apart is None:
        logger.info("Shared experts run as one more of the routed experts, which are packed alike.")
    else:
        logger.info("Shared experts run apart from the routed ones: %s.", apart)


class MoE(nn.Module):
    """Routed experts plus the shared one, summed in fp32."""

    def __init__(
        self, config: DeepseekV4Config, layer: int, *, expert_parallel: bool, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        expert_parallel = expert_parallel and get_tensor_model_parallel_world_size() > 1
        shared = rides_along(quant_config, expert_parallel, prefix)
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
