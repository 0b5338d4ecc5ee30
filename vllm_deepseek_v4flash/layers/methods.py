"""How each layer's weight is stored and multiplied: decided here, once, while vLLM constructs the layer.

| weight | where | linear layers | routed experts |
|---|---|---|---|
| packed | everywhere | `PackedLinearMethod` | `PackedExpertsMethod` |
| plain | small, on a CPU with compiled ops | `PlainLinearMethod`, bf16 if exact | `PlainExpertsMethod`, bf16 if exact |
| plain | elsewhere | `PlainLinearMethod` for the layers of `linear.py`, vLLM's for its own | `PlainExpertsMethod` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..compat import LinearBase, LinearMethodBase, QuantizeMethodBase, UnquantizedLinearMethod, set_weight_attrs
from ..ops.dispatch import backends
from ..ops.fused_experts import fused_experts
from ..ops.grouped_linear import grouped_linear
from ..ops.linear_fp32 import linear_fp32
from ..ops.merged_linear import merged_linear
from ..ops.packed_experts import packed_experts
from ..ops.packed_linear import packed_linear
from ..ops.packed_weight import SYMMETRIC_ZERO, QuantizationError, Scheme, canonical_shapes, shard_scheme
from .linear import Fp32Linear, GroupedLinear, MergedLinear

Schemes = Mapping[str, Scheme]
"""How the packed weights of a checkpoint are packed, by native module name; plain weights are not in it."""

SMALL_WEIGHT = 1 << 20
"""Elements up to which a CPU spends more on starting vLLM's product (oneDNN) than on the product."""

# 2^-10, about the largest of the weights that vLLM makes up.
_DUMMY_UE8M0 = 127 - 10


class Unpacked:
    """Stands in for the quantization config of a checkpoint that has none: vLLM's layers ask it for their method."""

    schemes: ClassVar[Schemes] = {}
    online_quantization_config = None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return method_for(layer, prefix, self.schemes)


def method_for(layer: nn.Module, prefix: str, schemes: Schemes) -> QuantizeMethodBase | None:
    """The method of a layer under construction on the default device; None if vLLM is to choose.

    Args:
        prefix: the layer's name in the model.
    """
    module, device = native_module(prefix), torch.get_default_device()
    if isinstance(layer, LinearBase):
        return linear_method(layer, module, schemes, device)
    return experts_method(module, schemes, device) if module.endswith(".experts") else None


def native_module(prefix: str) -> str:
    """DeepSeek's name of the module that the model has under `prefix`."""
    return prefix.removeprefix("model.")


def linear_method(layer: LinearBase, module: str, schemes: Schemes, device: torch.device) -> LinearMethodBase:
    """The method of the linear layer that holds the weight of `module`, or merges several next to it."""
    fp32 = isinstance(layer, Fp32Linear)
    if isinstance(layer, MergedLinear):
        first = layer.projections[0]
        module, fp32 = f"{module.rpartition('.')[0]}.{first.name}", first.fp32
    if module in schemes:
        method = PackedMergedMethod if isinstance(layer, MergedLinear) else PackedLinearMethod
        return method(schemes[module], torch.float32 if fp32 else None)
    compiled = compiles(device)
    for kind, plain in (
        (MergedLinear, MergedLinearMethod),
        (Fp32Linear, Fp32LinearMethod),
        (GroupedLinear, GroupedLinearMethod),
    ):
        if isinstance(layer, kind):
            return plain(shorten=compiled)
    columns = getattr(layer, "input_size_per_partition", layer.input_size)
    if compiled and sum(layer.output_partition_sizes) * columns <= SMALL_WEIGHT:
        return PlainLinearMethod(shorten=True)
    return UnquantizedLinearMethod()


def experts_method(module: str, schemes: Schemes, device: torch.device) -> QuantizeMethodBase:
    """The method of the routed experts `module`.

    Raises:
        QuantizationError: only one of their two stacks is packed.
    """
    first = f"{module}.0.w1", f"{module}.0.w2"
    if not any(name in schemes for name in first):
        return PlainExpertsMethod(shorten=compiles(device))
    if not all(name in schemes for name in first):
        raise QuantizationError(f"{first[0]} and {first[1]}: both must be packed, or neither")
    return PackedExpertsMethod(schemes[first[0]], schemes[first[1]])


def compiles(device: torch.device) -> bool:
    """Whether the ops of a CPU are compiled: they read bf16 weights whatever the dtype of the input."""
    return device.type == "cpu" and "cpu" in backends("cpu")


def why_not_fused(schemes: Schemes, prefix: str) -> str | None:
    """Why the shared expert of the MoE layer `prefix` cannot be in the routed experts' stacks; None where it can."""
    ffn = native_module(prefix)
    for name in ("w1", "w3", "w2"):
        routed, shared = (schemes.get(f"{ffn}.{expert}.{name}") for expert in ("experts.0", "shared_experts"))
        if routed is None or shared is None:
            return "both would have to be packed"
        if routed != shared:
            return f"their {name} is {_summary(shared)}, the routed ones' {_summary(routed)}"
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


def _row_loader(rows: Sequence[int], rank: int) -> Any:
    """A loader for a parameter that stacks `rows[i]` rows of part i; without a part's number, it takes the whole."""

    def weight_loader(param: nn.Parameter, loaded: torch.Tensor, part: int | None = None) -> None:
        target = param.data if part is None else param.data.narrow(0, sum(rows[:part]), rows[part])
        load_shard(target, loaded, rank)

    return weight_loader


def _empty(shape: tuple[int, ...], dtype: torch.dtype, weight_loader: Any, name: str = "weight") -> nn.Parameter:
    """A parameter that is not filled yet. `--load-format dummy` leaves integers as they are here: valid ones."""
    value = torch.empty(shape, dtype=dtype)
    if name == "perm":
        value.copy_(torch.arange(shape[-1]))
    elif name == "zeros":
        value.fill_(SYMMETRIC_ZERO)
    elif dtype == torch.uint8 and name == "scales":
        value.fill_(_DUMMY_UE8M0)
    param = nn.Parameter(value, requires_grad=False)
    set_weight_attrs(param, {"weight_loader": weight_loader})
    return param


def _shortest(weight: torch.Tensor) -> torch.Tensor | None:
    """A small weight as bf16 if that is exact: with few tokens, a CPU waits for weights rather than for products."""
    if weight.numel() > SMALL_WEIGHT:
        return None
    halves = weight.to(torch.bfloat16)
    return halves if torch.equal(halves.to(weight.dtype), weight) else None


class PlainLinearMethod(LinearMethodBase):
    """A linear layer whose parameter `weight` [N, K] is multiplied as it is.

    The parameter is a plain one: every use of vLLM's own class of parameters passes through Python.
    """

    def __init__(self, *, shorten: bool) -> None:
        self.shorten = shorten

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        loader = _row_loader(output_partition_sizes, getattr(layer, "tp_rank", 0))
        shape = sum(output_partition_sizes), input_size_per_partition
        layer.register_parameter("weight", _empty(shape, params_dtype, loader))
        layer.short_weight = None

    def process_weights_after_loading(self, layer: Any) -> None:
        # The parameter stays as it is, since vLLM may load other values into it that are not exact in bf16.
        layer.short_weight = _shortest(layer.weight.data) if self.shorten else None

    def weight(self, layer: Any) -> torch.Tensor:
        """What is multiplied: [N, K]."""
        return layer.weight if layer.short_weight is None else layer.short_weight

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        weight = self.weight(layer)
        return merged_linear(x, weight, weight.shape[:1], [x.dtype])[0]


class MergedLinearMethod(PlainLinearMethod):
    """Several linear layers of one input; each result has the dtype of its projection."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> list[torch.Tensor]:
        dtypes = [torch.float32 if projection.fp32 else x.dtype for projection in layer.projections]
        return merged_linear(x, self.weight(layer), layer.output_partition_sizes, dtypes)


class Fp32LinearMethod(PlainLinearMethod):
    """Keeps the result in fp32."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_fp32(x, self.weight(layer))


class GroupedLinearMethod(PlainLinearMethod):
    """Multiplies each group's input by that group's rows of the weight."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return grouped_linear(x, self.weight(layer))


class PackedLinearMethod(LinearMethodBase):
    """A linear layer whose parameters are the canonical tensors of its weight (`ops/packed_weight.py`)."""

    def __init__(self, scheme: Scheme, dtype: torch.dtype | None) -> None:
        """dtype: what the input is converted to and the result has; None for the input's."""
        self.scheme, self.dtype = scheme, dtype
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
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        # Each part is sharded by itself.
        whole, parts = self.scheme, output_partition_sizes
        schemes = [shard_scheme(whole, (n, columns), (n * (output_size // rows), input_size)) for n in parts]
        self.scheme = schemes[0]
        shapes = canonical_shapes(self.scheme, rows, columns)
        by_part = [canonical_shapes(self.scheme, n, columns) for n in parts]
        for name, (size, dtype) in shapes.items():
            loader = _row_loader([part[name][0][0] for part in by_part], getattr(layer, "tp_rank", 0))
            layer.register_parameter(name, _empty(size, dtype, loader, name))
        self.names = tuple(shapes)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the loader has already packed the weights into their final form."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        if self.dtype is not None:
            x = x.to(self.dtype)
        return packed_linear(x, {name: getattr(layer, name) for name in self.names}, self.scheme)


class PackedMergedMethod(PackedLinearMethod):
    """Several linear layers of one input, packed in the same way, whose results have one dtype."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> list[torch.Tensor]:
        return list(super().apply(layer, x).split(layer.output_partition_sizes, dim=-1))


class PlainExpertsMethod(QuantizeMethodBase):
    """Experts in the model's dtype: w13_weight [E, 2I, H] and w2_weight [E, H, I]."""

    def __init__(self, *, shorten: bool) -> None:
        self.shorten = shorten

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
        layer.short_weights = None

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.shorten:
            w13, w2 = _shortest(layer.w13_weight.data), _shortest(layer.w2_weight.data)
            # Both or neither: the op takes them in one dtype.
            layer.short_weights = None if w13 is None or w2 is None else (w13, w2)

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        w13, w2 = layer.short_weights or (layer.w13_weight, layer.w2_weight)
        return fused_experts(x, w13, w2, weights, expert_ids, swiglu_limit=layer.limit, first_expert=layer.first_expert)


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
                layer.register_parameter(f"{group}_{name}", _empty((*stack, *size), dtype, weight_loader, name))
            self.names[group] = tuple(shapes)

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        w13, w2 = ({n: getattr(layer, f"{g}_{n}") for n in self.names[g]} for g in ("w13", "w2"))
        return packed_experts(
            x, w13, w2, self.schemes["w13"], self.schemes["w2"], weights, expert_ids,
            swiglu_limit=layer.limit, first_expert=layer.first_expert,
        )  # fmt: skip
