"""The parameters of the model that vLLM serves, without the model: what `load_weights` fills."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vllm_deepseek_v4flash.checkpoint import names
from vllm_deepseek_v4flash.config import DeepseekV4Config


def load_stacked(parameter: Any, tensor: torch.Tensor, shard_id: str, expert_id: int) -> None:
    """vLLM's `weight_loader` of stacked experts: w1 and w3 share `parameter[expert_id]`, w2 has its own."""
    rows = parameter[expert_id]
    inter = tensor.shape[0]
    part = rows if shard_id == "w2" else rows[:inter] if shard_id == "w1" else rows[inter:]
    part.copy_(tensor)


class FakeModel(nn.Module):
    """The served model's parameters, NaN until loaded (integers: -1); optionally one pipeline stage of it."""

    def __init__(
        self, config: DeepseekV4Config, layers: range | None = None, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        experts, inter, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        layers = range(config.num_hidden_layers) if layers is None else layers
        for name, spec in names.expected_tensors(config).items():
            layer = names.layer_index(name)
            here = layer in layers if layer is not None else first if name == "embed.weight" else last
            if here and names.expert_index(name) is None:
                self.add(name if name == "head.weight" else f"model.{name}", spec.shape, spec.integer)
        for layer in layers:
            prefix = f"model.layers.{layer}.ffn.experts"
            for name, shape in (("w13", (experts, 2 * inter, hidden)), ("w2", (experts, hidden, inter))):
                self.add(f"{prefix}.{name}_weight", shape).weight_loader = load_stacked

    def add(self, name: str, shape: Iterable[int], integer: bool = False) -> Any:
        """Register a parameter under a dotted name, with the modules on the way to it."""
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        empty = torch.full(tuple(shape), -1 if integer else float("nan"))
        data = empty.to(torch.int32) if integer else empty
        parameter: Any = nn.Parameter(data, requires_grad=False)
        module.register_parameter(leaf, parameter)
        return parameter
