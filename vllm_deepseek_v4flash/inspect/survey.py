"""What a checkpoint directory holds and why it cannot be served, from config.json and the safetensors headers alone."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import names
from ..checkpoint.errors import CheckpointError
from ..checkpoint.formats import format_of
from ..checkpoint.headers import DTYPE_BITS, FLOAT_CODES, TensorHeader, read_headers
from ..checkpoint.plan import HELD_UNPACKED
from ..config import DeepseekV4Config
from ..ops.packed_weight import QuantizationError, Scheme
from .capacity import ResidentTensor

_FLOATS = (*FLOAT_CODES, "F64")
_INTEGERS = ("I64", "I32")
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# What the model keeps in fp32 (tid2eid in int32) whatever its dtype; see `layers/`.
_FOUR_BYTES = re.compile(r"hc_|.*\.(hc_\w+|attn_sink|ape|bias|tid2eid)$")
_ROUTER_PARAMETERS = ("bias", "tid2eid")
# As many tensors of one kind are named; the counts are complete.
MAX_LISTED = 20

Describe = Callable[[str, Mapping[str, TensorHeader]], Scheme]
Alike = tuple[str, Scheme, tuple[int, ...], str]
"""What the modules of one row of the table share: name pattern, scheme, shape, stored dtype."""


@dataclass(frozen=True)
class Problem:
    """One reason why the checkpoint cannot be served; `name` is the stored tensor or the native module."""

    kind: str
    name: str
    text: str


@dataclass(frozen=True)
class Row:
    """Modules that are stored alike: `*` in `module` stands for layer and expert numbers."""

    module: str
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """What `inspect_checkpoint` found. Bytes are those of the files."""

    directory: Path
    config: DeepseekV4Config
    method: str
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    tensors: int
    nbytes: int
    skipped: int
    """Tensors of mtp.* blocks, which are not served."""
    skipped_bytes: int
    resident: tuple[ResidentTensor, ...]


def inspect_checkpoint(directory: str | Path) -> Report:
    """Read config.json and every header, and compare each module with what the config asks for.

    Raises:
        CheckpointError: there is nothing to compare: no directory, no or another model's config.json, files that
            `read_headers` refuses. Everything else is in `Report.problems`.
    """
    directory = Path(directory)
    values = read_config(directory)
    try:
        config = DeepseekV4Config.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
    stored = read_headers(directory)
    survey = _Survey(config, _model_bytes(values))
    for tensor in stored.values():
        survey.take(tensor)
    method = survey.describe_all(values.get("quantization_config") or values.get("compression_config"))
    served = [tensor for tensor in stored.values() if not names.is_mtp(tensor.name)]
    nbytes = sum(tensor.nbytes for tensor in served)
    return Report(
        directory, config, method, survey.rows(), tuple(survey.problems), len(served), nbytes,
        len(stored) - len(served), sum(tensor.nbytes for tensor in stored.values()) - nbytes, survey.residents(),
    )  # fmt: skip


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a mapping; CheckpointError says what is wrong with it."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: name the one that holds config.json and the shards")
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json: name the directory of a downloaded checkpoint")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is a JSON {type(values).__name__}, should be an object")
    return values


def model_dtype(values: Mapping[str, Any]) -> str:
    """The dtype that vLLM's `--dtype auto` gives the model: the config's, but bfloat16 for float32 or none."""
    name = str(values.get("torch_dtype") or values.get("dtype") or "bfloat16").removeprefix("torch.")
    return name if name in ("bfloat16", "float16") else "bfloat16"


def _model_bytes(values: Mapping[str, Any]) -> int:
    return _DTYPE_BYTES[model_dtype(values)]


class _Survey:
    """Sorts stored tensors by native module and finds what does not fit."""

    def __init__(self, config: DeepseekV4Config, value_bytes: int) -> None:
        self.config, self.value_bytes = config, value_bytes
        self.expected = names.expected_tensors(config)
        self.problems: list[Problem] = []
        self.leaves: defaultdict[str, dict[str, TensorHeader]] = defaultdict(dict)
        self.schemes: dict[str, Scheme] = {}
        self.bare: dict[str, TensorHeader] = {}
        self.fused: dict[str, TensorHeader] = {}
        self.covered: set[str] = set()

    def problem(self, kind: str, name: str, text: str) -> None:
        self.problems.append(Problem(kind, name, text))

    def take(self, tensor: TensorHeader) -> None:
        """File one stored tensor under its native name."""
        if names.is_mtp(tensor.name):
            return
        native = names.native_name(tensor.name)
        fused = names.fused_shape(self.config, native) if native else None
        module, _, leaf = (native or "").rpartition(".")
        # A hash layer has no `gate.bias`, the others no `gate.tid2eid`; neither is a leaf of the router's weight.
        is_leaf = f"{module}.weight" in self.expected
        if module.endswith(".gate") and leaf in _ROUTER_PARAMETERS:
            is_leaf = False
        if native is None or not (fused or native in self.expected or is_leaf):
            self.problem("unexpected", tensor.name, f"{_has(tensor)}; config.json asks for no such tensor")
            return
        is_bare = native in self.expected and not native.endswith(".weight")
        filed = self.fused if fused else self.bare if is_bare else self.leaves[module]
        other = filed.setdefault(native if fused or is_bare else leaf, tensor)
        if other is not tensor:
            self.problem("duplicate", tensor.name, f"{_has(tensor)}; {other.name} is the same tensor, {native}")
        elif fused:
            self.covered.update(part for part, _ in names.fused_parts(self.config, native))
            self._compare(tensor, native, fused, _FLOATS)

    def describe_all(self, quantization: Any) -> str:
        """Find every module's scheme, compare shapes, and name what is missing; returns the method's name."""
        method, describe = self._describer(quantization)
        for native, spec in self.expected.items():
            module = native.removesuffix(".weight")
            if module == native:
                if native in self.bare:
                    self._compare(self.bare[native], native, spec.shape, _INTEGERS if spec.integer else _FLOATS)
                else:
                    self.problem("missing", native, f"should be {list(spec.shape)}")
            elif module in self.leaves:
                if native in self.covered:
                    self.problem("duplicate", native, "is stored alone and in a fused tensor of its layer")
                self._describe(module, spec.shape, describe)
            elif native not in self.covered:
                self.problem("missing", native, f"should be {list(spec.shape)}")
        self._check_stacks()
        return method

    def _describer(self, quantization: Any) -> tuple[str, Describe]:
        if quantization is not None and not isinstance(quantization, dict):
            self.problem("config", "quantization_config", f"is {quantization!r}, should be an object")
            quantization = None
        method = str((quantization or {}).get("quant_method", "none"))
        try:
            found = format_of(quantization)
        except QuantizationError as error:
            self.problem("config", "quantization_config", str(error))
            found = format_of(None)
        if quantization:
            return method, lambda module, leaves: found.describe(quantization, module, leaves)

        def unquantised(module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
            scheme = found.describe({}, module, leaves)
            if scheme.kind != "plain":
                raise QuantizationError(f"is packed as {scheme.kind}, but config.json has no quantization_config")
            return scheme

        return method, unquantised

    def _describe(self, module: str, shape: tuple[int, ...], describe: Describe) -> None:
        leaves = self.leaves[module]
        if len(shape) != 2:
            weight = leaves.get("weight")
            if weight is None or len(leaves) > 1:
                found = ", ".join(sorted(leaves))
                self.problem("mis-typed", module, f"has {found}; should be a plain weight {list(shape)}")
            elif self._compare(weight, f"{module}.weight", shape, _FLOATS):
                self.schemes[module] = Scheme("plain", module=module, shape=shape)
            return
        try:
            scheme = describe(module, leaves)
        except QuantizationError as error:
            self.problem("format", module, str(error).removeprefix(f"{module}: "))
            return
        if tuple(scheme.shape) != shape:
            packed = "" if scheme.kind == "plain" else f" ({scheme.kind})"
            self.problem("mis-shaped", module, f"has {list(scheme.shape)}{packed}, should be {list(shape)}")
            return
        self.schemes[module] = scheme

    def _compare(self, tensor: TensorHeader, native: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> bool:
        label = tensor.name if tensor.name == native else f"{tensor.name} ({native})"
        if tensor.shape != shape:
            self.problem("mis-shaped", label, f"{_has(tensor)}, should be {list(shape)}")
        elif tensor.dtype not in dtypes:
            self.problem("mis-typed", label, f"{_has(tensor)}, should be {' or '.join(dtypes)}")
        else:
            return True
        return False

    def _check_stacks(self) -> None:
        """The experts of a layer share stacked parameters, so they must be packed alike."""
        first: dict[tuple[int | None, str], tuple[str, Scheme]] = {}
        for module, scheme in self.schemes.items():
            if names.expert_index(module + ".weight") is None:
                continue
            stack = names.layer_index(module), "w2" if module.endswith(".w2") else "w1 and w3"
            other, seen = first.setdefault(stack, (module, scheme))
            if seen != scheme and (seen.kind, scheme.kind) != ("plain", "plain"):
                kinds = f"is {scheme_label(scheme)}, {other} is {scheme_label(seen)}"
                self.problem("format", module, f"{kinds}; the experts of a layer must be packed alike")

    def rows(self) -> tuple[Row, ...]:
        """The table, in the order of the model; vectors and mHC's small matrices come last."""
        counts: Counter[Alike] = Counter()
        sizes: Counter[Alike] = Counter()

        def add(key: Alike, nbytes: int) -> None:
            counts[key] += 1
            sizes[key] += nbytes

        vectors: list[str] = []
        for module, scheme in self.schemes.items():
            if len(scheme.shape) != 2:
                vectors.append(module)
                continue
            leaves = self.leaves[module]
            nbytes = sum(tensor.nbytes for tensor in leaves.values())
            add((_pattern(module), scheme, scheme.shape, _weight_dtype(leaves)), nbytes)
        for native, tensor in self.fused.items():
            add((_pattern(native), Scheme("plain"), tensor.shape, tensor.dtype), tensor.nbytes)
        for module in vectors:
            tensor = self.leaves[module]["weight"]
            add(("norms", Scheme("plain"), (), tensor.dtype), tensor.nbytes)
        for tensor in self.bare.values():
            add(("sinks, ape, mHC, router biases and tables", Scheme("plain"), (), tensor.dtype), tensor.nbytes)
        return tuple(Row(*key, count, sizes[key]) for key, count in counts.items())

    def residents(self) -> tuple[ResidentTensor, ...]:
        """Every weight as the model will hold it, with equal ones counted together."""
        counts: Counter[ResidentTensor] = Counter()
        for native, spec in self.expected.items():
            module = native.removesuffix(".weight")
            held = None if module in HELD_UNPACKED else self.schemes.get(module)
            value_bytes = 4 if _FOUR_BYTES.match(native) else self.value_bytes
            counts[ResidentTensor(_pattern(module), spec.shape, held or Scheme("plain"), value_bytes)] += 1
        return tuple(dataclasses.replace(tensor, count=count) for tensor, count in counts.items())


def scheme_label(scheme: Scheme) -> str:
    """A word or two for people: "int4 sym act-order"."""
    if scheme.kind != "int4":
        return scheme.kind
    return f"int4 {'asym' if scheme.zero_points else 'sym'}{' act-order' if scheme.act_order else ''}"


def _weight_dtype(leaves: Mapping[str, TensorHeader]) -> str:
    """The stored type of the weight itself: its largest leaf's."""
    return max(leaves.values(), key=lambda tensor: (tensor.nbytes, DTYPE_BITS[tensor.dtype])).dtype


def _pattern(native: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", native)


def _has(tensor: TensorHeader) -> str:
    return f"has {list(tensor.shape)} {tensor.dtype}"
