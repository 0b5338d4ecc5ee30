"""Which module of a checkpoint is packed how, found out before anything is allocated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config import DeepseekV4Config
from ..ops.packed_weight import QuantizationError, Scheme
from . import names
from .formats import Format, format_of
from .headers import TensorHeader

# vLLM's vocabulary layers hold plain weights only, so these are unpacked at load.
HELD_UNPACKED = ("embed", "head")


@dataclass(frozen=True)
class PackedModule:
    """One packed weight: how it is stored, what it becomes, and the leaves that make it up."""

    format: Format
    scheme: Scheme
    leaves: frozenset[str]
    files: tuple[str, ...]
    """The files that hold them, for messages."""

    def repack(self, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored tensors by leaf name, all of `self.leaves`, as canonical ones (`scheme.py`)."""
        return self.format.repack(leaves, self.scheme)


def plan_weights(
    config: DeepseekV4Config,
    quantization_config: dict[str, Any],
    stored: Iterable[tuple[str, str, tuple[int, ...], str]],
) -> dict[str, PackedModule]:
    """Describe every packed linear of a checkpoint by its DeepSeek-native module name.

    Args:
        stored: name, safetensors dtype code, shape and file of each stored tensor.

    Raises:
        QuantizationError: a format or bit width that is not served, or a packed weight of the wrong shape.
    """
    expected = names.expected_tensors(config)
    shapes = {
        name.removesuffix(".weight"): spec.shape
        for name, spec in expected.items()
        if name.endswith(".weight") and len(spec.shape) == 2
    }
    leaves: defaultdict[str, dict[str, TensorHeader]] = defaultdict(dict)
    files: defaultdict[str, set[str]] = defaultdict(set)
    for name, dtype, shape, file in stored:
        native = None if names.is_mtp(name) else names.native_name(name)
        module, _, leaf = (native or "").rpartition(".")
        # The router's bias and table are tensors of their own, whatever its weight is packed as.
        if module in shapes and (leaf == "weight" or native not in expected):
            leaves[module][leaf] = TensorHeader(dtype, tuple(shape))
            files[module].add(file)
    fmt = format_of(quantization_config)
    plan: dict[str, PackedModule] = {}
    for module, present in leaves.items():
        scheme = fmt.describe(quantization_config, module, present)
        if scheme.kind == "plain":
            continue
        if tuple(scheme.shape) != shapes[module]:
            raise QuantizationError(
                f"{module}: the packed tensors hold a weight of {list(scheme.shape)}, config.json asks for "
                f"{list(shapes[module])}"
            )
        plan[module] = PackedModule(fmt, scheme, frozenset(present), tuple(sorted(files[module])))
    _check_experts(plan, config)
    return plan


def _check_experts(plan: Mapping[str, PackedModule], config: DeepseekV4Config) -> None:
    """The experts of a layer share stacked parameters, so they must be packed alike."""
    for layer in range(config.num_hidden_layers):
        for kinds in (("w1", "w3"), ("w2",)):
            found: dict[Scheme | None, str] = {}
            for expert in range(config.n_routed_experts):
                for kind in kinds:
                    module = f"layers.{layer}.ffn.experts.{expert}.{kind}"
                    found.setdefault(plan[module].scheme if module in plan else None, module)
            if len(found) > 1:
                (a, first), (b, second) = list(found.items())[:2]
                raise QuantizationError(
                    f"{first} is {a or 'not packed'}, {second} is {b or 'not packed'}: experts of one layer are "
                    "stacked and must be packed alike"
                )
