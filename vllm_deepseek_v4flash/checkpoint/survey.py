"""Whether a checkpoint's tensors fit its config.json, and how each packed module is stored.

`inspect` and vLLM's quantization config survey the headers of a whole checkpoint, the loader surveys the tensors as
they arrive: all three come to the same verdict, in the same words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..config import DeepseekV4Config, line, shown
from ..ops.packed_weight import QuantizationError, Scheme
from . import names
from .counts import check_counts
from .doubles import may_be_stored_twice, same_in_files
from .errors import CheckpointError
from .formats import Format, format_of
from .formats.common import either, is_router_parameter
from .formats.regular import PatternError, restart_clock
from .headers import PLAIN_CODES, TensorHeader
from .plan import PackedModule

_INTEGER_CODES = ("I64", "I32")
# How many problems of one kind are listed; the counts are complete.
_MAX_LISTED = 20

Kind = Literal[
    "config", "unexpected", "duplicate", "missing", "mis-shaped", "mis-typed", "mis-valued", "format", "unplaceable"
]


@dataclass(frozen=True)
class Problem:
    """One reason why a checkpoint cannot be loaded; `name` is a stored tensor, a native module or a config key."""

    kind: Kind
    name: str
    text: str


@dataclass(frozen=True)
class Place:
    """Where a stored tensor belongs, in DeepSeek's names.

    Attributes:
        role: "whole" fills one of the model's tensors, "fused" all of a layer's w1 and w3, or w2. A "part" belongs to
            a module whose format decides what it is. "again" has the place of a tensor that came before it.
        native: The tensor's name.
        module: `native` without its last component, `leaf`.
    """

    role: Literal["whole", "fused", "part", "again"]
    native: str
    module: str
    leaf: str


def survey(
    config: DeepseekV4Config, quantization_config: Mapping[str, Any] | None, headers: Iterable[TensorHeader]
) -> Survey:
    """The survey of a whole checkpoint, finished.

    Raises:
        CheckpointError: config.json has more layers or experts than the tensors, so there is nothing to compare.
    """
    headers = list(headers)
    check_counts(config, headers)
    whole = Survey(config, quantization_config)
    for header in headers:
        whole.take(header)
    whole.finish()
    for native, pair in whole.doubles.items():
        if not same_in_files(*pair):
            whole.add_double(pair[1], native)
    return whole


class Survey:
    """Files stored tensors under their native names and collects what does not fit.

    Attributes:
        expected: The tensors of an unquantised checkpoint, by native name.
        problems: What was found so far; complete after `finish`.
        tensors: Each stored tensor that has a place, by native name.
        leaves: Those that make up a module's weight, by module and leaf.
        fused: Those that hold all experts of a layer, by native name.
        doubles: Pairs of tensors that are the same tensor by their names, by native name. Their values decide.
        skipped: The tensors of `mtp.*` blocks, which are not loaded.
        schemes: How each module that fits is stored, by native name; known after `finish`.
    """

    def __init__(self, config: DeepseekV4Config, quantization_config: Mapping[str, Any] | None) -> None:
        self.config = config
        self.expected = names.expected_tensors(config)
        self.problems: list[Problem] = []
        self.tensors: dict[str, TensorHeader] = {}
        self.leaves: defaultdict[str, dict[str, TensorHeader]] = defaultdict(dict)
        self.fused: dict[str, TensorHeader] = {}
        self.doubles: dict[str, tuple[TensorHeader, TensorHeader]] = {}
        self.skipped: list[TensorHeader] = []
        self.schemes: dict[str, Scheme] = {}
        self._quantization: Mapping[str, Any] = {}
        self._format: Format | None = None
        # The stored name of the fused tensor that holds an expert's matrix, by the matrix' native name.
        self._fused_in: dict[str, str] = {}
        if quantization_config is not None and not isinstance(quantization_config, Mapping):
            self.add("config", "quantization_config", f"is {shown(quantization_config)}, should be an object")
            return
        self._quantization = quantization_config or {}
        restart_clock()
        try:
            self._format = format_of(self._quantization)
        except QuantizationError as error:
            self.add("config", "quantization_config", str(error))

    def add(self, kind: Kind, name: str, text: str) -> None:
        self.problems.append(Problem(kind, name, text))

    def add_double(self, header: TensorHeader, native: str) -> None:
        """Report a tensor that is stored a second time, with other values."""
        other = self.tensors[native].name
        which = f", {native}" if native not in (other, header.name) else ""
        self.add("duplicate", header.name, f"{_has(header)}; {other} is the same tensor{which}, with other values")

    def take(self, header: TensorHeader) -> Place | None:
        """File one stored tensor; its place, or None if it is skipped or does not fit by itself."""
        if names.is_mtp(header.name):
            self.skipped.append(header)
            return None
        native = names.native_name(header.name)
        place = self._place(native) if native is not None else None
        if place is None:
            self.add("unexpected", header.name, f"{_has(header)}; config.json asks for no such tensor")
            return None
        other = self.tensors.setdefault(place.native, header)
        if other is not header:
            if self._can_be_compared(place.native, other, header):
                self.doubles[place.native] = (other, header)
                return Place("again", place.native, place.module, place.leaf)
            which = f", {native}" if native not in (other.name, header.name) else ""
            self.add("duplicate", header.name, f"{_has(header)}; {other.name} is the same tensor{which}")
            return None
        if place.role == "fused":
            self.fused[place.native] = header
            self._fused_in.update((part, header.name) for part, _ in names.fused_parts(self.config, place.native))
            return place if self._fits(header, place.native, names.fused_shape(self.config, place.native)) else None
        spec = self.expected.get(place.native)
        if self._is_leaf(place):
            self.leaves[place.module][place.leaf] = header
            if spec is None or (len(spec.shape) == 2 and header.dtype not in PLAIN_CODES):
                return Place("part", place.native, place.module, place.leaf)
        assert spec is not None
        return place if self._fits(header, place.native, spec.shape, spec.integer) else None

    def finish(self, is_needed: Callable[[str], bool] = lambda native: True) -> None:
        """Judge the modules as wholes, and report what is missing of the native tensors that are needed."""
        for native, spec in self.expected.items():
            module = native.removesuffix(".weight")
            if module in self.leaves:
                if native in self._fused_in:
                    self.add("duplicate", native, f"is stored separately and in {self._fused_in[native]}")
                self._judge(module, spec.shape)
            elif native not in self.tensors and native not in self._fused_in and is_needed(native):
                self.add("missing", native, f"should be {list(spec.shape)}")
        for layer in range(self.config.num_hidden_layers):
            self._check_experts(f"layers.{layer}.ffn.experts")

    def plan(self) -> dict[str, PackedModule]:
        """Every packed module that fits."""
        assert self._format is not None or not self.schemes
        plan = {}
        for module, scheme in self.schemes.items():
            if scheme.kind != "plain" and self._format is not None:
                leaves = self.leaves[module]
                files = {header.file.name for header in leaves.values()}
                transposed = scheme.shape != self.expected[f"{module}.weight"].shape
                plan[module] = PackedModule(self._format, scheme, frozenset(leaves), tuple(sorted(files)), transposed)
        return plan

    def format_label(self, module: str, leaves: Mapping[str, TensorHeader]) -> str:
        """A few words on how a module is stored that is not the model's; "unknown" if no format here reads it."""
        if self._format is None:
            return "unknown"
        try:
            return format_label(self._format.describe(self._quantization, module, leaves))
        except QuantizationError:
            return "unknown"

    def stored_name(self, native: str) -> str | None:
        """The stored tensor that holds a native one; None if it has not been taken, or is packed."""
        header = self.tensors.get(native)
        return self._fused_in.get(native) if header is None else header.name

    def _place(self, native: str) -> Place | None:
        module, _, leaf = native.rpartition(".")
        place = Place("whole", native, module, leaf)
        if native in self.expected or self._is_leaf(place):
            return place
        if names.fused_shape(self.config, native) is not None:
            return Place("fused", native, module, leaf)
        return None

    def _is_leaf(self, place: Place) -> bool:
        """Whether a tensor is part of a module's weight; the router's bias and table are tensors of their own."""
        return f"{place.module}.weight" in self.expected and not is_router_parameter(place.module, place.leaf)

    def _can_be_compared(self, native: str, one: TensorHeader, other: TensorHeader) -> bool:
        """Whether two tensors of one place are plain and fit it, so that their values may be the same."""
        spec = self.expected.get(native)
        return (
            spec is not None
            and may_be_stored_twice(native)
            and native not in self.doubles
            and one.shape == other.shape == spec.shape
            and {one.dtype, other.dtype} <= set(PLAIN_CODES)
        )

    def _fits(self, header: TensorHeader, native: str, shape: tuple[int, ...] | None, integer: bool = False) -> bool:
        assert shape is not None
        name = label(header.name, native)
        codes = _INTEGER_CODES if integer else PLAIN_CODES
        if header.shape != shape:
            self.add("mis-shaped", name, f"{_has(header)}, should be {list(shape)}")
        elif header.dtype not in codes:
            self.add("mis-typed", name, f"{_has(header)}, should be {either(codes)}")
        else:
            return True
        return False

    def _judge(self, module: str, shape: tuple[int, ...]) -> None:
        """Find one module's scheme. A plain weight of the wrong shape or dtype was reported when it was taken."""
        leaves = self.leaves[module]
        weight = leaves.get("weight")
        if len(shape) != 2:
            if leaves.keys() != {"weight"}:
                found = ", ".join(sorted(leaves))
                self.add("mis-typed", module, f"has {found}; should be a plain weight {list(shape)}")
            elif weight is not None and weight.shape == shape and weight.dtype in PLAIN_CODES:
                self.schemes[module] = Scheme("plain", module=module, shape=shape)
            return
        if self._format is None:
            return
        try:
            scheme = self._format.describe(self._quantization, module, leaves)
        except PatternError as error:
            # It is the same for every module.
            self.add("config", "quantization_config", str(error))
            self._format = None
            self.schemes.clear()
            return
        except QuantizationError as error:
            self.add("format", module, str(error).removeprefix(f"{module}: "))
            return
        turned = module == "embed" and self._format.transposes_embedding and scheme.kind == "int4"
        if tuple(scheme.shape) in (shape, shape[::-1] if turned else shape):
            self.schemes[module] = scheme
        elif scheme.kind != "plain":
            self.add("mis-shaped", module, f"has {list(scheme.shape)} ({scheme.kind}), should be {list(shape)}")

    def _check_experts(self, experts: str) -> None:
        """The experts of a layer share stacked parameters, w1 with w3, so they must be packed alike."""
        first: dict[str, tuple[str, Scheme]] = {}
        for expert in range(self.config.n_routed_experts):
            for name, stack in (("w1", "w13"), ("w3", "w13"), ("w2", "w2")):
                module = f"{experts}.{expert}.{name}"
                scheme = Scheme("plain") if f"{module}.weight" in self._fused_in else self.schemes.get(module)
                if scheme is None:
                    continue
                other, seen = first.setdefault(stack, (module, scheme))
                if scheme != seen and not scheme.kind == seen.kind == "plain":
                    differ = f"is {_storage(scheme)}, {other} is {_storage(seen)}"
                    self.add("format", module, f"{differ}; the experts of a layer are stacked and must be packed alike")
        if len(first) == 2:
            (w1, scheme13), (w2, scheme2) = first["w13"], first["w2"]
            if (scheme13.kind == "plain") != (scheme2.kind == "plain"):
                differ = f"is {_storage(scheme2)}, {w1} is {_storage(scheme13)}"
                self.add("format", w2, f"{differ}; the experts of a layer must all be packed, or none of them")


def problem_lines(problems: Sequence[Problem], rest: str) -> list[str]:
    """A line of counts and a line for each problem; where they are cut, `rest` says how to see all."""
    counts = Counter(problem.kind for problem in problems)
    lines = [", ".join(f"{count:,} {kind}" for kind, count in counts.items())]
    shown: Counter[str] = Counter()
    for problem in problems:
        shown[problem.kind] += 1
        if shown[problem.kind] <= _MAX_LISTED:
            lines.append("  " + line(f"{problem.kind}: {problem.name}: {problem.text}"))
    for kind, count in counts.items():
        if count > _MAX_LISTED:
            lines.append(f"  ... and {count - _MAX_LISTED:,} more {kind} ({rest})")
    return lines


def refuse(problems: Sequence[Problem]) -> None:
    """Raise a CheckpointError that lists the problems, if there are any."""
    if problems:
        lines = problem_lines(problems, "`vllm-deepseek-v4flash inspect DIR --json` lists all")
        raise CheckpointError("the checkpoint does not fit its config.json: " + "\n".join(lines))


def label(stored: str, native: str) -> str:
    """What a message calls a stored tensor."""
    return stored if stored == native else f"{stored} ({native})"


def scheme_label(scheme: Scheme) -> str:
    """A few words for tables: "int4 sym act-order"."""
    if scheme.kind != "int4":
        return scheme.kind
    return f"int4 {'asym' if scheme.zero_points else 'sym'}{' act-order' if scheme.act_order else ''}"


def format_label(scheme: Scheme) -> str:
    """`scheme_label` with a plain weight's dtype: "plain bfloat16"."""
    return f"plain {str(scheme.dtype).removeprefix('torch.')}" if scheme.kind == "plain" else scheme_label(scheme)


def _storage(scheme: Scheme) -> str:
    """What tells a scheme from others of the same shape."""
    if scheme.kind == "plain":
        return "not packed"
    scales = str(scheme.scale_dtype).removeprefix("torch.")
    return f"{scheme_label(scheme)} in groups of {scheme.group_size} with {scales} scales"


def _has(header: TensorHeader) -> str:
    return f"has {list(header.shape)} {header.dtype}"
