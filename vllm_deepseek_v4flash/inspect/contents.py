"""What a checkpoint holds, from config.json and the safetensors headers alone: what `inspect` reports."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.headers import DTYPE_BITS, TensorHeader
from ..checkpoint.plan import HELD_UNPACKED
from ..checkpoint.survey import Problem, Survey, survey
from ..config import DeepseekV4Config, printable
from ..ops.packed_weight import Scheme
from .capacity import ResidentTensor
from .chat_files import ChatFiles
from .source import Basis, open_source, quantization_config

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# What the model keeps in fp32 (tid2eid in int32) whatever its dtype; see `layers/`.
_FOUR_BYTES = re.compile(r"hc_|.*\.(hc_\w+|attn_sink|ape|bias|tid2eid)$")

Alike = tuple[str, Scheme, tuple[int, ...], str]
"""What the modules of one row of the table share: name pattern, scheme, shape, stored dtype."""


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

    directory: str
    config: DeepseekV4Config
    method: str
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    tensors: int
    nbytes: int
    skipped: int
    """Tensors of mtp.* blocks, which are not loaded."""
    skipped_bytes: int
    skipped_formats: Mapping[str, int]
    """How many of their matrices are stored in which format."""
    resident: tuple[ResidentTensor, ...]
    basis: Basis
    """What the tensors are known from; anything but "headers" makes an estimate of shapes, dtypes and bytes."""
    total_size: int | None
    """Bytes of all tensors as the index gives them, where `basis` is "index" and it does."""
    chat: ChatFiles


def inspect_checkpoint(model: str | Path, revision: str | None = None) -> Report:
    """Read config.json and every header, and compare each module with what the config asks for.

    Args:
        model: A directory, or OWNER/NAME on the Hugging Face hub, of which only headers and small files are read.
        revision: Of the repository.

    Raises:
        CheckpointError: there is nothing to compare: no directory, no or another model's config.json, files that
            `read_headers` refuses. Everything else is in `Report.problems`.
    """
    source = open_source(model, revision)
    quantization, stored = quantization_config(source.values), source.headers
    found = survey(source.config, quantization, stored)
    skipped_bytes = sum(tensor.nbytes for tensor in found.skipped)
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return Report(
        source.where, source.config, printable(str(method or "none"))[:80], rows(found), tuple(found.problems),
        len(stored) - len(found.skipped), sum(tensor.nbytes for tensor in stored) - skipped_bytes,
        len(found.skipped), skipped_bytes, skipped_formats(found),
        residents(found, _DTYPE_BYTES[model_dtype(source.values)]), source.basis, source.total_size, source.chat,
    )  # fmt: skip


def model_dtype(values: Mapping[str, Any]) -> str:
    """The dtype that vLLM's `--dtype auto` gives the model: the config's, but bfloat16 for float32 or none."""
    name = str(values.get("torch_dtype") or values.get("dtype") or "bfloat16").removeprefix("torch.")
    return name if name in ("bfloat16", "float16") else "bfloat16"


def rows(found: Survey) -> tuple[Row, ...]:
    """The table, in the order of the model; vectors and mHC's small matrices come last."""
    counts: Counter[Alike] = Counter()
    sizes: Counter[Alike] = Counter()

    def add(key: Alike, nbytes: int) -> None:
        counts[key] += 1
        sizes[key] += nbytes

    vectors: list[TensorHeader] = []
    for module, scheme in found.schemes.items():
        leaves = found.leaves[module]
        if len(scheme.shape) != 2:
            vectors.append(leaves["weight"])
            continue
        nbytes = sum(tensor.nbytes for tensor in leaves.values())
        add((_pattern(module), scheme, scheme.shape, _weight_dtype(leaves)), nbytes)
    for native, tensor in found.fused.items():
        add((_pattern(native), Scheme("plain"), tensor.shape, tensor.dtype), tensor.nbytes)
    for tensor in vectors:
        add(("norms", Scheme("plain"), (), tensor.dtype), tensor.nbytes)
    for native, tensor in found.tensors.items():
        if native in found.expected and not native.endswith(".weight"):
            add(("sinks, ape, mHC, router biases and tables", Scheme("plain"), (), tensor.dtype), tensor.nbytes)
    return tuple(Row(*key, count, sizes[key]) for key, count in counts.items())


def skipped_formats(found: Survey) -> dict[str, int]:
    """The formats of the matrices that are not loaded; they need not be those of the rest."""
    modules: dict[str, dict[str, TensorHeader]] = {}
    for tensor in found.skipped:
        module, _, leaf = tensor.name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    # A matrix of a linear layer has a `weight`, `qweight` or `weight_packed`; others (mHC's) are parameters.
    linear = {
        module: leaves
        for module, leaves in modules.items()
        if any("weight" in leaf and len(tensor.shape) == 2 for leaf, tensor in leaves.items())
    }
    return dict(Counter(found.format_label(module, leaves) for module, leaves in linear.items()))


def residents(found: Survey, value_bytes: int) -> tuple[ResidentTensor, ...]:
    """Every weight as the model will hold it, with equal ones counted together; a plain value takes `value_bytes`."""
    counts: Counter[ResidentTensor] = Counter()
    for native, spec in found.expected.items():
        module = native.removesuffix(".weight")
        held = None if module in HELD_UNPACKED else found.schemes.get(module)
        size = 4 if _FOUR_BYTES.match(native) else value_bytes
        counts[ResidentTensor(_pattern(module), spec.shape, held or Scheme("plain"), size)] += 1
    return tuple(dataclasses.replace(tensor, count=count) for tensor, count in counts.items())


def _weight_dtype(leaves: Mapping[str, TensorHeader]) -> str:
    """The stored type of the weight itself: its largest leaf's."""
    return max(leaves.values(), key=lambda tensor: (tensor.nbytes, DTYPE_BITS[tensor.dtype])).dtype


def _pattern(native: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", native)
