"""Linear layers that vLLM does not have: fp32 results, block-diagonal by group, and several of one input.

Their weights are applied as plain tensors, because every use of vLLM's own class of parameters passes through Python.
"""

from __future__ import annotations

from typing import Any

import torch

from ..compat import ColumnParallelLinear, LinearBase, ReplicatedLinear, UnquantizedLinearMethod
from ..ops.dispatch import backends
from ..ops.grouped_linear import grouped_linear
from ..ops.linear_fp32 import linear_fp32
from ..ops.linears import linears

SMALL_WEIGHT = 1 << 20
"""Elements up to which a CPU spends more on starting vLLM's product (oneDNN) than on the product."""


class SmallLinearMethod(UnquantizedLinearMethod):
    """Multiplies small weights on a CPU by our own op; anything else as vLLM does."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.weight.is_cpu and layer.weight.numel() <= SMALL_WEIGHT:
            layer.plain_weight = shortest(layer.weight.data)
        else:
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if layer.plain_weight is None or bias is not None:
            return super().apply(layer, x, bias)
        return linears(x, [layer.plain_weight], [x.dtype])[0]


def shortest(weight: torch.Tensor) -> torch.Tensor:
    """A small weight as bf16 where our CPU ops lose nothing by it: few tokens wait for weights, not for products."""
    if weight.numel() > SMALL_WEIGHT or not weight.is_cpu or "cpu" not in backends("cpu"):
        return weight
    halves = weight.to(torch.bfloat16)
    return halves if torch.equal(halves.to(weight.dtype), weight) else weight


def quick(layer: Any) -> Any:
    """The linear layer, which uses `SmallLinearMethod` unless it is quantised."""
    layer.plain_weight = None
    if type(layer.quant_method) is UnquantizedLinearMethod:
        layer.quant_method = SmallLinearMethod()
    return layer


class Together:
    """Linear layers of one input, in one op where a CPU has all their weights plain.

    None of them may combine ranks: only replicated and column-parallel layers.
    """

    def __init__(self, *layers: LinearBase) -> None:
        self.layers = layers

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[T, K] to [T, N_i] each, fp32 from `Fp32Linear`, else the dtype of `x`."""
        weights = [layer.plain_weight for layer in self.layers]
        if not x.is_cpu or any(weight is None for weight in weights):
            return [layer(x) for layer in self.layers]
        dtypes = [torch.float32 if isinstance(layer, Fp32Linear) else x.dtype for layer in self.layers]
        return linears(x, weights, dtypes)


class Fp32LinearMethod(UnquantizedLinearMethod):
    """Keeps the weight as loaded and the result in fp32."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """No more than a plain view: vLLM's CPU method would repack the weight for a GEMM in the model's dtype."""
        layer.plain_weight = layer.weight.data

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_fp32(x, layer.plain_weight)


class Fp32Linear(ReplicatedLinear):
    """[T, K] to [T, N] fp32, the whole weight on every rank: router, compressors (docs/model.md, "Kept in fp32")."""

    quant_method: Any

    def __init__(self, input_size: int, output_size: int, *, quant_config: Any, prefix: str) -> None:
        super().__init__(
            input_size, output_size, bias=False, quant_config=quant_config, prefix=prefix, return_bias=False
        )
        self.plain_weight: torch.Tensor | None = None
        if isinstance(self.quant_method, UnquantizedLinearMethod):
            self.quant_method = Fp32LinearMethod()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.quant_method, Fp32LinearMethod):
            return self.quant_method.apply(self, x)
        # A packed weight is multiplied in the dtype of x.
        return self.quant_method.apply(self, x.float(), None)


class GroupedLinearMethod(UnquantizedLinearMethod):
    """Multiplies each group's input by that group's rows of the weight."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """No repacking: the weight is used by group, not as one matrix."""
        layer.plain_weight = shortest(layer.weight.data)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return grouped_linear(x, layer.plain_weight)


class GroupedLinear(ColumnParallelLinear):
    """The first half of the output projection (docs/model.md, "Attention"): each group has its own rows of the weight.

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
