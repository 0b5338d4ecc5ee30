"""Linear layers that vLLM does not have: fp32 results, and block-diagonal by group.

Their weights are applied as plain tensors, because every use of vLLM's own class of parameters passes through Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..compat import ColumnParallelLinear, ReplicatedLinear, UnquantizedLinearMethod
from ..ops.grouped_linear import grouped_linear
from ..ops.linear_fp32 import linear_fp32


class Fp32LinearMethod(UnquantizedLinearMethod):
    """Keeps the weight as loaded and the result in fp32."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """No more than a plain view: vLLM's CPU method would repack the weight for a GEMM in the model's dtype."""
        layer.plain_weight = layer.weight.data

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_fp32(x, layer.plain_weight)


class Fp32Linear(ReplicatedLinear):
    """[T, K] to [T, N] fp32, the whole weight on every rank: router gate and compressors (spec section 5.4)."""

    quant_method: Any

    def __init__(self, input_size: int, output_size: int, *, quant_config: Any, prefix: str) -> None:
        super().__init__(
            input_size, output_size, bias=False, quant_config=quant_config, prefix=prefix, return_bias=False
        )
        if isinstance(self.quant_method, UnquantizedLinearMethod):
            self.quant_method = Fp32LinearMethod()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.quant_method, Fp32LinearMethod):
            return self.quant_method.apply(self, x)
        # A packed weight is multiplied in the dtype of x.
        return self.quant_method.apply(self, x.float(), None)


class GroupedLinearMethod(UnquantizedLinearMethod):
    """Multiplies each group's input by that group's rows of the weight."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """No more than a plain view: the weight is used by group, not as one matrix."""
        layer.plain_weight = layer.weight.data

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return grouped_linear(x, layer.plain_weight)


class GroupedLinear(ColumnParallelLinear):
    """The first half of the output projection: group g of the input meets group g's rows of the weight (section 3.5).

    Sharded by group, so `groups` must divide by the tensor-parallel size.
    """

    quant_method: Any

    def __init__(self, groups: int, input_size: int, output_size: int, *, quant_config: Any, prefix: str) -> None:
        super().__init__(
            input_size, groups * output_size, bias=False, quant_config=quant_config, prefix=prefix, return_bias=False
        )
        if isinstance(self.quant_method, UnquantizedLinearMethod):
            self.quant_method = GroupedLinearMethod()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, local groups, input_size] to [T, local groups * output_size], same dtype."""
        return self.quant_method.apply(self, x, None).flatten(1)
