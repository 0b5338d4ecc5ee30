"""`inspect`'s findings as text for people and as JSON for machines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.survey import problem_lines, scheme_label
from ..config import LayerKind
from .capacity import Capacity, Fit
from .contents import Report

_GIB = 1 << 30
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def as_text(report: Report, capacity: Capacity | None, reasons: Sequence[str], flags: Sequence[str]) -> str:
    """The whole report; `flags` are further options of `vllm serve`, in addition to those worked out here."""
    lines = [*_summary(report), "", *_module_table(report)]
    if report.problems:
        counts, *problems = problem_lines(report.problems, "--json lists all")
        lines += ["", f"problems: {counts}", *problems]
    if capacity is not None:
        lines += ["", *_capacity_lines(capacity, flags)]
    lines += ["", *_verdict(report, reasons)]
    return "\n".join(lines)


def as_json(report: Report, capacity: Capacity | None, reasons: Sequence[str]) -> dict[str, Any]:
    """The same as plain values; bytes and counts are exact."""
    return {
        "servable": not reasons,
        "reasons": list(reasons),
        "directory": report.directory,
        "basis": report.basis,
        "index_total_size": report.total_size,
        "chat": dataclasses.asdict(report.chat),
        "quant_method": report.method,
        "layers": {kind.value: report.config.layer_kinds.count(kind) for kind in LayerKind},
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "formats": _formats(report),
        "skipped_mtp": {
            "tensors": report.skipped,
            "bytes": report.skipped_bytes,
            "formats": dict(report.skipped_formats),
        },
        "modules": [
            {
                "module": row.module,
                "format": row.scheme.kind,
                "group_size": row.scheme.group_size,
                "zero_points": row.scheme.zero_points,
                "act_order": row.scheme.act_order,
                "dtype": row.dtype,
                "shape": list(row.shape),
                "count": row.count,
                "bytes": row.nbytes,
            }
            for row in report.rows
        ],
        "problems": [dataclasses.asdict(problem) for problem in report.problems],
        "capacity": None if capacity is None else _capacity_json(capacity),
    }


def _capacity_json(capacity: Capacity) -> dict[str, Any]:
    limits = capacity.limits
    return {
        "gpus": limits.gpus,
        "memory_bytes": limits.memory,
        "gpu_memory_utilization": limits.utilization,
        "expert_parallel": limits.expert_parallel,
        "max_num_seqs": limits.max_num_seqs,
        "weight_bytes_per_gpu": capacity.weights,
        "weight_bytes_per_gpu_by_part": capacity.by_part,
        "kv_bytes_per_token": capacity.kv_bytes_per_token,
        "kv_block_bytes": capacity.pool.block_bytes,
        "request_bytes": capacity.request_bytes,
        "choices": [_fit_json(fit) for fit in capacity.fits],
        "recommended": None if capacity.best is None else _fit_json(capacity.best),
    }


def _fit_json(fit: Fit) -> dict[str, int]:
    return {
        "max_num_batched_tokens": fit.batch_tokens,
        "max_model_len": fit.max_model_len,
        "context_tokens": fit.context,
        "kv_cache_bytes": fit.cache,
        "step_bytes_estimate": fit.activations,
    }


def _summary(report: Report) -> list[str]:
    config, kinds = report.config, Counter(report.config.layer_kinds)
    layers = ", ".join(f"{kinds[kind]} {kind.value}" for kind in LayerKind if kinds[kind])
    lines = [
        f"{report.directory}: DeepSeek-V4, {config.num_hidden_layers} layers ({layers}), "
        f"{config.n_routed_experts} experts, hidden size {config.hidden_size}; quant_method {report.method}",
        f"{report.tensors:,} tensors, {report.nbytes:,} bytes ({_gb(report.nbytes)}, {_gib(report.nbytes)})",
        f"matrices: {_counted(_formats(report))}",
        *report.chat.lines(),
    ]
    if report.basis != "headers":
        lines.append(_estimate(report))
    if report.skipped:
        lines.append(
            f"skipped: {report.skipped:,} mtp.* tensors, {_gb(report.skipped_bytes)} "
            f"(matrices: {_counted(report.skipped_formats)}); multi-token prediction is not supported"
        )
    return lines


def _estimate(report: Report) -> str:
    """What the figures rest on where no shard was read."""
    if report.basis == "config":
        return (
            "estimate: there are neither shards nor an index; tensors are assumed to be those of config.json, with "
            "what DeepSeek quantises packed as its quantization_config says"
        )
    text = "estimate: no shard is here; names are the index's, shapes and dtypes are assumed from config.json"
    if report.total_size is None:
        return text
    found = report.nbytes + report.skipped_bytes
    if found == report.total_size:
        return f"{text}; together they have exactly the bytes that the index gives"
    return f"{text}; together they have {found:,} bytes, and the index gives {report.total_size:,}"


def _formats(report: Report) -> dict[str, int]:
    """How many of the model's matrices are stored in which format; a stack of experts counts as one."""
    formats: Counter[str] = Counter()
    for row in report.rows:
        if row.shape:
            plain = row.scheme.kind == "plain"
            formats[f"plain {_DTYPE_NAMES.get(row.dtype, row.dtype)}" if plain else scheme_label(row.scheme)] += (
                row.count
            )
    return dict(formats)


def _counted(formats: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {label}" for label, count in formats.items()) or "none"


def _module_table(report: Report) -> list[str]:
    body = [
        (
            row.module,
            scheme_label(row.scheme),
            row.dtype,
            str(row.scheme.group_size or ""),
            "x".join(map(str, row.shape)),
            f"{row.count:,}",
            _gb(row.nbytes),
        )
        for row in report.rows
    ]
    return _table(("module", "format", "stored as", "group", "shape", "count", "bytes"), body, left=3)


def _capacity_lines(capacity: Capacity, flags: Sequence[str]) -> list[str]:
    limits = capacity.limits
    parts = ", ".join(f"{_gib(size)} {name}" for name, size in capacity.by_part.items())
    lines = [
        f"{limits.gpus} x {_gib(limits.memory)}, of which --gpu-memory-utilization {limits.utilization:g} "
        f"lets vLLM use {_gib(capacity.budget)} each",
        f"  weights per GPU  {_gib(capacity.weights)}: {parts}",
        f"  KV cache         {capacity.kv_bytes_per_token:,.0f} bytes per token of context on every GPU, and "
        f"{_mib(capacity.request_bytes)} per running request for windows and states",
        "",
    ]
    header = ("--max-num-batched-tokens", "step (estimate)", "KV cache", "context in it", "--max-model-len")
    rows = [
        (
            f"{fit.batch_tokens}{' *' if fit is capacity.best else ''}",
            _gib(fit.activations),
            _gib(fit.cache),
            f"{fit.context:,} tokens",
            str(fit.max_model_len) if fit.max_model_len else "does not start",
        )
        for fit in capacity.fits
    ]
    lines += ["  " + line for line in _table(header, rows, left=0)]
    if capacity.best is not None:
        lines += ["", f"  pass (*): {' '.join(_options(capacity, capacity.best, flags))}"]
    return lines


def _options(capacity: Capacity, fit: Fit, flags: Sequence[str]) -> list[str]:
    limits = capacity.limits
    options = [f"--tensor-parallel-size {limits.gpus}"] if limits.gpus > 1 else []
    if limits.expert_parallel:
        options.append("--enable-expert-parallel")
    return [
        *options,
        f"--gpu-memory-utilization {limits.utilization:g}",
        f"--max-num-seqs {limits.max_num_seqs}",
        f"--max-num-batched-tokens {fit.batch_tokens}",
        f"--max-model-len {fit.max_model_len}",
        *flags,
    ]


def _verdict(report: Report, reasons: Sequence[str]) -> list[str]:
    if reasons:
        return ["This checkpoint cannot be served:", *(f"  {reason}" for reason in reasons)]
    if report.basis == "headers":
        return ["This checkpoint can be served."]
    known = "the names of its tensors" if report.basis == "index" else "its config.json"
    return [f"This checkpoint can be served as far as {known} can tell. Inspect it again once its shards are here."]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns as wide as their content; the first `left` are text, the others numbers."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


def _gb(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1000:.2f} kB"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
