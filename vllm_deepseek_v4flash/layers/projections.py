"""The linear layers of one input: merged where the formats of their weights agree, so that few products do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from ..compat import ColumnParallelLinear, ReplicatedLinear, get_tensor_model_parallel_world_size
from ..ops.packed_weight import FP8_BLOCK, Scheme
from .linear import Fp32Linear, MergedLinear, Projection
from .methods import Schemes, native_module


class Projections:
    """Adds to `owner` the layers that make all projections of one input, and calls them.

    A projection that is merged with no other becomes a layer of its own under its own name. Layers are looked up at
    every call, because vLLM's LoRA replaces them in their parents.
    """

    def __init__(
        self,
        owner: nn.Module,
        input_size: int,
        projections: Sequence[Projection],
        *,
        column_parallel: bool = False,
        merged_name: str | None = None,
        quant_config: Any,
        prefix: str,
    ) -> None:
        """Create the layers.

        Args:
            owner: has the submodules that the projections' names lead through.
            column_parallel: whether each projection is sharded by rows over the ranks; otherwise every rank has all.
            merged_name: of the layer that merges all of them; `fused_` and their labels by default.
            quant_config: has `schemes`, how the checkpoint's weights are packed.
            prefix: the owner's name in the model.
        """
        tp_size = get_tensor_model_parallel_world_size() if column_parallel else 1
        self.layers: list[tuple[nn.Module, str, list[Projection]]] = []
        """Each layer's parent, its name there, and what it computes."""
        for group in merge(projections, quant_config.schemes, native_module(prefix), tp_size):
            path = group[0].name
            if len(group) > 1:
                path = "_".join(["fused", *(projection.label for projection in group)])
                if merged_name is not None and len(group) == len(projections):
                    path = merged_name
            options: dict[str, Any] = {"quant_config": quant_config, "prefix": f"{prefix}.{path}"}
            parent, _, leaf = path.rpartition(".")
            module = owner.get_submodule(parent)
            module.add_module(leaf, _layer(input_size, group, column_parallel, options))
            self.layers.append((module, leaf, group))

    def __call__(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """[T, K] to [T, local rows] of each projection by its name: fp32 where it says so, else the dtype of `x`."""
        results: dict[str, torch.Tensor] = {}
        for module, leaf, group in self.layers:
            layer: Any = module._modules[leaf]
            result = layer(x)
            if len(group) == 1:
                results[group[0].name] = result
            else:
                results.update(zip((projection.name for projection in group), result, strict=True))
        return results


def _layer(input_size: int, group: list[Projection], column_parallel: bool, options: dict[str, Any]) -> nn.Module:
    first = group[0]
    if len(group) > 1:
        return MergedLinear(input_size, group, disable_tp=not column_parallel, **options)
    if first.fp32:
        return Fp32Linear(input_size, first.rows, **options)
    kind = ColumnParallelLinear if column_parallel else ReplicatedLinear
    return kind(input_size, first.rows, bias=False, return_bias=False, **options)


def merge(projections: Sequence[Projection], schemes: Schemes, owner: str, tp_size: int = 1) -> list[list[Projection]]:
    """Which projections share one weight.

    All plain weights do, whatever the dtypes of their results. Packed ones need equal schemes, and results of one
    dtype, in which they are multiplied. Two kinds stay separate: weights in activation order, since each has its own
    order, and those that would begin within a block of 128 rows that share fp8 scales.

    Args:
        owner: the native module that the projections' names are relative to.
        tp_size: over how many ranks the rows of each projection are split.
    """
    groups: list[list[Projection]] = []
    latest: dict[Hashable, list[Projection]] = {}
    """The group of each format that is still open."""
    for projection in projections:
        scheme = schemes.get(f"{owner}.{projection.name}")
        key = None if scheme is None else (scheme, projection.fp32)
        group = latest.get(key)
        if group is None or (scheme is not None and not _fits(scheme, group, tp_size)):
            group = latest[key] = []
            groups.append(group)
        group.append(projection)
    return groups


def _fits(scheme: Scheme, group: list[Projection], tp_size: int) -> bool:
    """Whether another weight packed by `scheme` can follow those of the group."""
    rows = sum(projection.rows // tp_size for projection in group)
    return not scheme.act_order and (scheme.kind != "fp8" or rows % FP8_BLOCK == 0)


def merged_layers(model: nn.Module) -> dict[str, MergedLinear]:
    """The merged layers of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MergedLinear)}


def merged_parts(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Each native module that is part of a merged layer: that layer's name, and which part (for the loader)."""
    return {
        native_module(f"{name.rpartition('.')[0]}.{projection.name}"): (name, place)
        for name, layer in merged_layers(model).items()
        for place, projection in enumerate(layer.projections)
    }


def packed_modules_mapping(model: nn.Module) -> dict[str, list[str]]:
    """vLLM's convention: a merged layer's own name, and those of its parts, both relative to its parent."""
    return {
        name.rpartition(".")[2]: [projection.name for projection in layer.projections]
        for name, layer in merged_layers(model).items()
    }
