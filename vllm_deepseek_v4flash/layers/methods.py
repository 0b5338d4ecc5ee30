"""How packed weights live in vLLM's layers: canonical tensors as parameters, sharded, and applied without unpacking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.plan import PackedModule
from ..compat import LinearBase, LinearMethodBase, QuantizeMethodBase, UnquantizedLinearMethod, set_weight_attrs
from ..ops.fused_experts import fused_experts
from ..ops.packed_experts import packed_experts
from ..ops.packed_linear import packed_linear
from ..ops.packed_weight import QuantizationError, Scheme, canonical_shapes, shard_scheme


def method_for(plan: Mapping[str, PackedModule], layer: nn.Module, prefix: str) -> Any:
    """The quantisation method of `layer`, which vLLM knows as `prefix` (`model.` and the DeepSeek-native name)."""
    module = prefix.removeprefix("model.")
    if isinstance(layer, LinearBase):
        return PackedLinearMethod(plan[module].scheme) if module in plan else UnquantizedLinearMethod()
    if module.endswith(".experts"):
        first = f"{module}.0.w1", f"{module}.0.w2"
        if not any(name in plan for name in first):
            return UnquantizedExpertsMethod()
        if not all(name in plan for name in first):
            raise QuantizationError(f"{first[0]} and {first[1]}: both must be packed, or neither")
        return PackedExpertsMethod(plan[first[0]].scheme, plan[first[1]].scheme)
    return None


def packed_apart(plan: Mapping[str, PackedModule], prefix: str) -> str | None:
    """Why the shared expert of the MoE layer `prefix` cannot lie in the routed experts' stacks; None where it can."""
    ffn = prefix.removeprefix("model.")
    for name in ("w1", "w3", "w2"):
        routed, shared = (plan.get(f"{ffn}.{expert}.{name}") for expert in ("experts.0", "shared_experts"))
        if routed is None or shared is None:
            return "both would have to be packed"
        if routed.scheme != shared.scheme:
            return f"their {name} is {_summary(shared.scheme)}, the routed ones' {_summary(routed.scheme)}"
    return None


def _summary(scheme: Scheme) -> str:
    """What tells a scheme from others of equal shape."""
    extras = " with zeros" * scheme.zero_points + " in activation order" * scheme.act_order
    return f"{scheme.kind} in groups of {scheme.group_size}{extras} ({scheme.scale_dtype} scales)"


def load_shard(param: torch.Tensor, loaded: torch.Tensor, rank: int) -> None:
    """Copy into `param` this rank's part of `loaded`: in each dimension that is longer there, part number `rank`."""
    for dim, (size, whole) in enumerate(zip(param.shape, loaded.shape, strict=True)):
        if whole != size:
            loaded = loaded.narrow(dim, rank * size, size)
    param.copy_(loaded)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, weight_loader: Any) -> nn.Parameter:
    param = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    set_weight_attrs(param, {"weight_loader": weight_loader})
    return param


class PackedLinearMethod(LinearMethodBase):
    """One linear whose canonical tensors (`scheme.py`) are its parameters."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.names: tuple[str, ...] = ()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        shape = sum(output_partition_sizes), input_size_per_partition
        self.scheme = shard_scheme(self.scheme, shape, (output_size, input_size))
        rank = getattr(layer, "tp_rank", 0)

        def weight_loader(param: nn.Parameter, loaded: torch.Tensor) -> None:
            load_shard(param.data, loaded, rank)

        shapes = canonical_shapes(self.scheme, *shape)
        for name, (size, dtype) in shapes.items():
            layer.register_parameter(name, _empty(size, dtype, weight_loader))
        self.names = tuple(shapes)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the loader has already packed the weights into their final form."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return packed_linear(x, {name: getattr(layer, name) for name in self.names}, self.scheme)


class UnquantizedExpertsMethod(QuantizeMethodBase):
    """Experts in the model's dtype: w13_weight [E, 2I, H] and w2_weight [E, H, I]."""

    def create_weights(self, layer: Any, hidden_size: int) -> None:
        def weight_loader(param: nn.Parameter, loaded: torch.Tensor, shard_id: str, expert_id: int) -> None:
            target = layer.place(param, expert_id)
            if target is not None:
                if shard_id != "w2":
                    target = target.chunk(2)[0 if shard_id == "w1" else 1]
                load_shard(target, loaded, layer.inner_rank)

        experts, inner = layer.local_experts, layer.inner
        dtype = torch.get_default_dtype()
        layer.register_parameter("w13_weight", _empty((experts, 2 * inner, hidden_size), dtype, weight_loader))
        layer.register_parameter("w2_weight", _empty((experts, hidden_size, inner), dtype, weight_loader))

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        return fused_experts(
            x, layer.w13_weight, layer.w2_weight, weights, expert_ids,
            swiglu_limit=layer.limit, first_expert=layer.first_expert,
        )  # fmt: skip


class PackedExpertsMethod(QuantizeMethodBase):
    """Packed experts: canonical tensors stacked as w13_<name> [E, 2, ...] (w1, w3) and w2_<name> [E, ...]."""

    def __init__(self, scheme13: Scheme, scheme2: Scheme) -> None:
        self.schemes = {"w13": scheme13, "w2": scheme2}
        self.names: dict[str, tuple[str, ...]] = {}

    def create_weights(self, layer: Any, hidden_size: int) -> None:
        def weight_loader(param: nn.Parameter, loaded: torch.Tensor, shard_id: str, expert_id: int) -> None:
            target = layer.place(param, expert_id)
            if target is not None:
                if shard_id != "w2":
                    target = target[0 if shard_id == "w1" else 1]
                load_shard(target, loaded, layer.inner_rank)

        local = {"w13": (layer.inner, hidden_size), "w2": (hidden_size, layer.inner)}
        whole = {"w13": (layer.full_inner, hidden_size), "w2": (hidden_size, layer.full_inner)}
        for group, stack in (("w13", (layer.local_experts, 2)), ("w2", (layer.local_experts,))):
            self.schemes[group] = shard_scheme(self.schemes[group], local[group], whole[group])
            shapes = canonical_shapes(self.schemes[group], *local[group])
            for name, (size, dtype) in shapes.items():
                layer.register_parameter(f"{group}_{name}", _empty((*stack, *size), dtype, weight_loader))
            self.names[group] = tuple(shapes)

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        w13, w2 = ({n: getattr(layer, f"{g}_{n}") for n in self.names[g]} for g in ("w13", "w2"))
        return packed_experts(
            x, w13, w2, self.schemes["w13"], self.schemes["w2"], weights, expert_ids,
            swiglu_limit=layer.limit, first_expert=layer.first_expert,
        )  # fmt: skip
