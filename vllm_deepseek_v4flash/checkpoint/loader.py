"""Fills a model's parameters from a stream of stored tensors, and refuses a checkpoint that does not fit.

Nothing here knows vLLM. A parameter that is sharded or stacked brings its own `weight_loader`, as vLLM's do.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from vllm_deepseek_v4flash.checkpoint import names
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError as CheckpointError
from vllm_deepseek_v4flash.checkpoint.names import TensorSpec
from vllm_deepseek_v4flash.checkpoint.plan import HELD_UNPACKED, PackedModule
from vllm_deepseek_v4flash.config import DeepseekV4Config
from vllm_deepseek_v4flash.log import logger_name
from vllm_deepseek_v4flash.ops.packed_weight import QuantizationError, dequantise

logger = logging.getLogger(logger_name(__name__))

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)
_PACKED_LEAVES = {
    "qweight", "qzeros", "scales", "g_idx",
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "scale", "weight_scale_inv",
}  # fmt: skip
_MAX_LISTED = 20
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
    packed: Mapping[str, PackedModule] | None = None,
    merged: Mapping[str, tuple[str, int]] | None = None,
) -> set[str]:
    """Load a checkpoint, whichever way its tensors are named and packed.

    Args:
        model: has a parameter (or buffer) `model.X` for native tensor X, `head.weight`, and for each layer
            stacked `ffn.experts.w13_weight` and `.w2_weight`, whose `weight_loader(parameter, tensor,
            shard_id="w1" | "w2" | "w3", expert_id=E)` places one expert's matrix. Any other parameter is
            filled by its `weight_loader(parameter, tensor)`; without one it takes the whole tensor. A model without
            parameters for the shared expert has it in the stack, as expert number `n_routed_experts`.
        weights: (stored name, full tensor), in any order; consumed once.
        local_layers: the layers of this pipeline stage; None for all. What belongs to another stage is
            checked when it comes by, and need not come.
        first_stage: whether the embedding is here.
        last_stage: whether the final norm, hc_head and the head are here.
        local_experts: under expert parallelism, the experts of this rank; None for all.
        packed: the quantised weights by native module name (`checkpoint/plan.py`). As soon as all leaves of one have
            come they are repacked on the model's device, and each canonical tensor goes to the parameter
            `<module>.<its name>`, or for experts to `w13_<its name>` and `w2_<its name>`.
        merged: where a native module's tensors are rows of a merged layer's: the layer's name in the model and the
            module's place in it. The `weight_loader(parameter, tensor, place)` of its parameters puts them there.

    Returns:
        The names of the parameters that were filled.

    Raises:
        CheckpointError: after the last tensor, listing each unexpected, duplicate, mis-shaped, mis-typed or
            missing tensor with the shape it has and the shape it should have.
    """
    load = _Load(model, config, local_layers, first_stage, last_stage, local_experts, packed or {}, merged or {})
    for stored, tensor in weights:
        load.take(stored, tensor)
    load.finish()
    return load.filled


@dataclass
class _Problem:
    kind: str
    name: str
    text: str


@dataclass
class _Load:
    model: nn.Module
    config: DeepseekV4Config
    local_layers: range | None
    first_stage: bool
    last_stage: bool
    local_experts: Collection[int] | None
    packed: Mapping[str, PackedModule]
    merged: Mapping[str, tuple[str, int]]
    pending: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)
    seen: dict[str, str] = field(default_factory=dict)
    problems: list[_Problem] = field(default_factory=list)
    mtp: int = 0

    def __post_init__(self) -> None:
        self.expected = names.expected_tensors(self.config)
        self.parameters = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        self.device = next(self.model.parameters()).device

    def take(self, stored: str, tensor: torch.Tensor) -> None:
        """Check one stored tensor and copy it to where it belongs."""
        if names.is_mtp(stored):
            self.mtp += 1
            return
        native = names.native_name(stored)
        module, _, leaf = (native or "").rpartition(".")
        if module in self.packed and (leaf == "weight" or native not in self.expected):
            self._take_packed(stored, module, leaf, tensor)
            return
        fused = names.fused_shape(self.config, native) if native else None
        if native is not None and fused is not None:
            if self._fits(stored, native, tensor, TensorSpec(fused)):
                for part, index in names.fused_parts(self.config, native):
                    self._place(stored, part, tensor[index])
            else:
                # Its parts are accounted for: one message about the stack is enough.
                self.seen.update((part, stored) for part, _ in names.fused_parts(self.config, native))
            return
        spec = self.expected.get(native) if native else None
        if native is None or spec is None:
            self._unexpected(stored, native, tensor)
        elif self._fits(stored, native, tensor, spec):
            self._place(stored, native, tensor)
        else:
            self.seen[native] = stored

    def _take_packed(self, stored: str, module: str, leaf: str, tensor: torch.Tensor) -> None:
        """Keep one leaf of a packed weight until all are there, then repack and place it."""
        native = f"{module}.weight"
        leaves = self.pending.setdefault(module, {})
        if native in self.seen or leaf in leaves:
            self._problem("duplicate", stored, f"has {list(tensor.shape)}, already read as {module}.{leaf}")
            return
        leaves[leaf] = tensor
        plan = self.packed[module]
        if leaves.keys() != plan.leaves:
            return
        del self.pending[module]
        self.seen[native] = stored
        if not self._is_local(native):
            return
        if module not in HELD_UNPACKED:  # those take many times their size on the way
            leaves = {leaf: tensor.to(self.device) for leaf, tensor in leaves.items()}
        try:
            canonical = plan.repack(leaves)
        except QuantizationError as error:
            raise CheckpointError(f"{', '.join(plan.files)}: {error}") from error
        if module in HELD_UNPACKED:
            self._fill(native, dequantise(canonical, plan.scheme))
            logger.info("%s is stored in %s and held unpacked.", module, plan.scheme.kind)
            return
        for name, part in canonical.items():
            self._fill(f"{module}.{name}", part)

    def finish(self) -> None:
        """Report what never came."""
        for module, leaves in self.pending.items():
            self.seen[f"{module}.weight"] = module
            for leaf in sorted(self.packed[module].leaves - leaves.keys()):
                self._problem("missing", f"{module}.{leaf}", "is part of a packed weight")
        if self.mtp:
            logger.info("Skipped %d mtp.* tensors: multi-token prediction is not served.", self.mtp)
        for native, spec in self.expected.items():
            if native not in self.seen and self._is_local(native):
                self._problem("missing", native, f"should be {list(spec.shape)}")
        if self.problems:
            raise CheckpointError(self._message())

    def _problem(self, kind: str, name: str, text: str) -> None:
        self.problems.append(_Problem(kind, name, text))

    def _unexpected(self, stored: str, native: str | None, tensor: torch.Tensor) -> None:
        has = f"has {list(tensor.shape)} {_dtype(tensor)}"
        module, _, leaf = (native or "").rpartition(".")
        plain = f"{module}.weight"
        if leaf in _PACKED_LEAVES and plain in self.expected:
            # A quantiser's leaf in place of `weight`; the plain tensor is then not missing but packed.
            self.seen.setdefault(plain, stored)
            self._problem("quantised", stored, f"{has}, should be an unquantised {plain}")
        else:
            self._problem("unexpected", stored, f"{has}, no such tensor in this config")

    def _fits(self, stored: str, native: str, tensor: torch.Tensor, spec: TensorSpec) -> bool:
        label = stored if stored == native else f"{stored} ({native})"
        has = f"has {list(tensor.shape)} {_dtype(tensor)}"
        if not spec.integer and _is_quantised(tensor):
            self._problem("quantised", label, f"{has}, should be {list(spec.shape)} in a float type")
            return False
        if tuple(tensor.shape) != spec.shape:
            self._problem("mis-shaped", label, f"{has}, should be {list(spec.shape)}")
            return False
        if tensor.dtype not in (_INTEGERS if spec.integer else _FLOATS):
            wanted = "int64 or int32" if spec.integer else "float32, bfloat16 or float16"
            self._problem("mis-typed", label, f"{has}, should be {wanted}")
            return False
        if spec.integer and tensor.numel() and not tensor.is_meta:
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= self.config.n_routed_experts:
                allowed = f"0 to n_routed_experts - 1 = {self.config.n_routed_experts - 1}"
                self._problem("mis-valued", label, f"has expert ids {low} to {high}, should be {allowed}")
                return False
        return True

    def _place(self, stored: str, native: str, tensor: torch.Tensor) -> None:
        if native in self.seen:
            other = self.seen[native]
            text = f"has {list(tensor.shape)}, already read as {other}" + _both(native, stored, other)
            self._problem("duplicate", stored, text)
            return
        self.seen[native] = stored
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
            self._problem("unplaceable", native, f"has {list(tensor.shape)}, the model has no {target}")
            return
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

    def _is_local(self, native: str) -> bool:
        layer = names.layer_index(native)
        if layer is None:
            return self.first_stage if native.startswith("embed.") else self.last_stage
        if self.local_layers is not None and layer not in self.local_layers:
            return False
        expert = names.expert_index(native)
        return expert is None or self.local_experts is None or expert in self.local_experts

    def _message(self) -> str:
        counts = Counter(problem.kind for problem in self.problems)
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        lines = [f"the checkpoint does not fit its config.json: {summary} tensors; nothing is served."]
        for problem in self.problems[:_MAX_LISTED]:
            lines.append(f"  {problem.kind}: {problem.name}: {problem.text}")
        if len(self.problems) > _MAX_LISTED:
            lines.append(f"  ... and {len(self.problems) - _MAX_LISTED} more")
        if counts["quantised"]:
            lines.append(
                "Quantised tensors (float8, int8 or packed 4 bit) came to an unquantised load: config.json "
                "has no quantization_config that this package serves. Use a bf16, fp16 or fp32 copy."
            )
        return "\n".join(lines)


def _target(native: str) -> tuple[str, int | None, str | None]:
    """The parameter's name in the model; for an expert's matrix also the expert and which matrix it is."""
    expert = names.expert_index(native)
    if expert is None:
        return native if native.startswith("head.") else f"model.{native}", None, None
    experts, _, rest = native.partition(f".experts.{expert}.")
    shard, _, leaf = rest.partition(".")
    return f"model.{experts}.experts.{_STACKED[shard]}_{leaf}", expert, shard


def _both(native: str, stored: str, other: str) -> str:
    return "" if stored == other else f"; both are {native}"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_quantised(tensor: torch.Tensor) -> bool:
    return tensor.element_size() == 1 or tensor.dtype == torch.int32
