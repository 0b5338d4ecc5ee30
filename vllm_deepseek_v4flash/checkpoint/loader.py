"""Fills a model's parameters from a stream of stored tensors, and refuses a checkpoint that does not fit.

`survey.py` decides what fits; only values are checked here. Nothing here depends on vLLM: a sharded or stacked
parameter has its own `weight_loader`, like vLLM's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import DeepseekV4Config
from ..log import logger_name
from ..ops.packed_weight import QuantizationError, dequantise
from . import names
from .doubles import may_be_stored_twice, same_values
from .dtypes import header_of
from .errors import CheckpointError as CheckpointError
from .formats.common import check_bias
from .plan import HELD_UNPACKED, PackedModule
from .survey import Place, Survey, label, refuse
from .values import check_packed_values, check_values

logger = logging.getLogger(logger_name(__name__))

_STACKED = {"w1": "w13", "w3": "w13", "w2": "w2"}


def load_weights(
    model: nn.Module,
    config: DeepseekV4Config,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    local_layers: range | None = None,
    first_stage: bool = True,
    last_stage: bool = True,
    local_experts: Collection[int] | None = None,
    quantization: Mapping[str, Any] | None = None,
    packed: Mapping[str, PackedModule] | None = None,
    merged: Mapping[str, tuple[str, int]] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> set[str]:
    """Load a checkpoint, whatever its tensor names and formats.

    Args:
        model: has a parameter (or buffer) `model.X` for native tensor X, `head.weight`, and for each layer
            stacked `ffn.experts.w13_weight` and `.w2_weight`, whose `weight_loader(parameter, tensor,
            shard_id="w1" | "w2" | "w3", expert_id=E)` places one expert's matrix. Any other parameter is
            filled by its `weight_loader(parameter, tensor)`; without one it takes the whole tensor. A model without
            parameters for the shared expert has it in the stack, as expert number `n_routed_experts`.
        weights: (stored name, full tensor), in any order; consumed once.
        local_layers: the layers of this pipeline stage; None for all. Tensors of other stages are checked if they
            arrive, and may be absent.
        first_stage: whether the embedding is here.
        last_stage: whether the final norm, hc_head and the head are here.
        local_experts: under expert parallelism, the experts of this rank; None for all.
        quantization: the `quantization_config` of config.json; None if the checkpoint is unquantised.
        packed: its packed modules by native name, as `Survey.plan` describes them. As soon as all leaves of one have
            arrived they are repacked on the model's device, and each canonical tensor goes to the parameter
            `<module>.<its name>`, or for experts to `w13_<its name>` and `w2_<its name>`.
        merged: where a native module's tensors are rows of a merged layer's: the layer's name in the model and the
            module's place in it. The `weight_loader(parameter, tensor, place)` of its parameters puts them there.
        device: the model's, where packed weights are repacked; None for that of its first parameter. While vLLM
            reloads weights, parameters are on no device.
        dtype: the model's, in which packed weights are multiplied.

    Returns:
        The names of the parameters that were filled.

    Raises:
        CheckpointError: after the last tensor, listing each unexpected, duplicate, mis-shaped, mis-typed or
            missing tensor with the shape it has and the shape it should have; at once for a packed weight with
            values that its format does not allow, and for a value that is not finite or will not be (`values.py`).
    """
    load = _Load(
        model, Survey(config, quantization), packed or {}, merged or {},
        local_layers, first_stage, last_stage, local_experts, device or next(model.parameters()).device, dtype,
    )  # fmt: skip
    for stored, tensor in weights:
        load.take(stored, tensor)
    load.finish()
    return load.filled


@dataclass
class _Load:
    model: nn.Module
    survey: Survey
    packed: Mapping[str, PackedModule]
    merged: Mapping[str, tuple[str, int]]
    local_layers: range | None
    first_stage: bool
    last_stage: bool
    local_experts: Collection[int] | None
    device: torch.device
    dtype: torch.dtype
    pending: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    # What a second tensor of the same name in another spelling is compared with.
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.config = self.survey.config
        self.parameters = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}

    def take(self, stored: str, tensor: torch.Tensor) -> None:
        """Check one stored tensor and copy it to where it belongs."""
        place = self.survey.take(header_of(tensor, stored))
        if place is None:
            return
        if place.role == "fused":
            for part, index in names.fused_parts(self.config, place.native):
                self._place(part, tensor[index])
        elif place.role == "part":
            self._take_part(place, tensor)
        elif place.role == "again":
            self._compare(place, stored, tensor)
        elif self._has_expert_ids(stored, place.native, tensor):
            if may_be_stored_twice(place.native):
                self.first[place.native] = tensor
            self._place(place.native, tensor)

    def _compare(self, place: Place, stored: str, tensor: torch.Tensor) -> None:
        """A tensor that was loaded under another name: the same values, of which the wider are kept."""
        first = self.first.get(place.native)
        if first is None:
            return  # it was refused
        if not (first.is_meta or tensor.is_meta or same_values(first, tensor)):
            self.survey.add_double(header_of(tensor, stored), place.native)
        elif tensor.dtype.itemsize > first.dtype.itemsize:
            self._place(place.native, tensor)

    def _has_expert_ids(self, stored: str, native: str, tensor: torch.Tensor) -> bool:
        """Whether an integer table holds numbers of experts; true for every other tensor."""
        if not self.survey.expected[native].integer or tensor.is_meta or not tensor.numel():
            return True
        low, high, last = int(tensor.min()), int(tensor.max()), self.config.n_routed_experts - 1
        if low >= 0 and high <= last:
            return True
        text = f"has expert ids {low} to {high}, should be 0 to n_routed_experts - 1 = {last}"
        self.survey.add("mis-valued", label(stored, native), text)
        return False

    def _take_part(self, place: Place, tensor: torch.Tensor) -> None:
        """Keep one leaf of a packed weight until all have arrived, then repack and place it."""
        module = place.module
        plan = self.packed.get(module)
        if plan is None:
            self._check_unpacked(place, tensor)
            return
        leaves = self.pending.setdefault(module, {})
        leaves[place.leaf] = tensor
        if leaves.keys() != plan.leaves:
            return
        del self.pending[module]
        native = f"{module}.weight"
        if not self._is_local(native):
            return
        if module not in HELD_UNPACKED:  # those take many times their size on the way
            leaves = {leaf: tensor.to(self.device) for leaf, tensor in leaves.items()}
        try:
            canonical = plan.repack(leaves)
        except QuantizationError as error:
            raise CheckpointError(f"{', '.join(plan.files)}: {error}") from error
        check_packed_values(f"{', '.join(plan.files)}: {module}", canonical, plan.scheme, self.dtype)
        if module in HELD_UNPACKED:
            weight = dequantise(canonical, plan.scheme)
            self._fill(native, weight.t() if plan.transposed else weight)
            logger.info("%s: dequantised at load (stored as %s).", module, plan.scheme.kind)
            return
        for name, part in canonical.items():
            self._fill(f"{module}.{name}", part)

    def _check_unpacked(self, place: Place, tensor: torch.Tensor) -> None:
        """A module that was not planned as packed may have a bias of zeros; the survey refuses any other leaf."""
        if place.leaf == "bias":
            try:
                check_bias(place.module, tensor)
            except QuantizationError as error:
                self.survey.add("mis-valued", place.native, str(error).removeprefix(f"{place.module}: "))

    def finish(self) -> None:
        """Report what does not fit, and what never came."""
        skipped = len(self.survey.skipped)
        if skipped:
            logger.info("Skipped %d mtp.* tensors: multi-token prediction is not supported.", skipped)
        self.survey.finish(self._is_local)
        reported = {problem.name for problem in self.survey.problems}
        for module in self.pending.keys() - reported:
            plan = self.packed[module]
            for leaf in sorted(plan.leaves - self.pending[module].keys()):
                self.survey.add("missing", f"{module}.{leaf}", f"is part of a packed weight in {', '.join(plan.files)}")
        refuse(self.survey.problems)

    def _place(self, native: str, tensor: torch.Tensor) -> None:
        if self._is_local(native):
            self._fill(native, tensor)

    def _fill(self, native: str, tensor: torch.Tensor) -> None:
        """Hand one tensor to the parameter that takes it, or takes a share of it."""
        module, _, leaf = native.rpartition(".")
        layer, place = self.merged.get(module, (None, None))
        target, expert, shard = _target(native) if layer is None else (f"{layer}.{leaf}", None, None)
        if ".shared_experts." in native and target not in self.parameters:
            routed = native.replace(".shared_experts.", f".experts.{self.config.n_routed_experts}.")
            target, expert, shard = _target(routed)
        parameter = self.parameters.get(target)
        if parameter is None:
            self.survey.add("unplaceable", native, f"has {list(tensor.shape)}, the model has no {target}")
            return
        check_values(self._label(native), tensor, parameter.dtype)
        loader: Callable[..., object] | None = getattr(parameter, "weight_loader", None)
        if shard is not None:
            if loader is None:
                raise TypeError(f"{target} has no weight_loader to place expert {expert}'s {shard} with")
            loader(parameter, tensor, shard_id=shard, expert_id=expert)
        elif place is not None:
            if loader is None:
                raise TypeError(f"{target} has no weight_loader to place the rows of {module} with")
            loader(parameter, tensor, place)
        elif loader is not None:
            loader(parameter, tensor)
        elif parameter.shape != tensor.shape:
            raise TypeError(
                f"{target} is {list(parameter.shape)} in the model, the whole tensor {list(tensor.shape)}: "
                f"a sharded parameter needs a weight_loader"
            )
        else:
            with torch.no_grad():
                parameter.copy_(tensor)
        self.filled.add(target)

    def _label(self, native: str) -> str:
        """What a message calls a native tensor: the name that it is stored under."""
        return label(self.survey.stored_name(native) or native, native)

    def _is_local(self, native: str) -> bool:
        layer = names.layer_index(native)
        if layer is None:
            return self.first_stage if native.startswith("embed.") else self.last_stage
        if self.local_layers is not None and layer not in self.local_layers:
            return False
        expert = names.expert_index(native)
        return expert is None or self.local_experts is None or expert in self.local_experts


def _target(native: str) -> tuple[str, int | None, str | None]:
    """The parameter's name in the model; for an expert's matrix also the expert and which matrix it is."""
    expert = names.expert_index(native)
    if expert is None:
        return native if native.startswith("head.") else f"model.{native}", None, None
    experts, _, rest = native.partition(f".experts.{expert}.")
    shard, _, leaf = rest.partition(".")
    return f"model.{experts}.experts.{_STACKED[shard]}_{leaf}", expert, shard
