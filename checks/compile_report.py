"""What compiled kernels need, as rows that `compile_table` collects, and as the table in the documentation."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arch:
    gpus: str
    shared_kb: int
    """What one program may have, at most."""
    native_fp8: bool


ARCHS = {
    80: Arch("A100", 163, False),
    86: Arch("RTX 3090", 99, False),
    89: Arch("RTX 4090, L40", 99, True),
    90: Arch("H100, H200", 227, True),
    100: Arch("B200", 227, True),
    120: Arch("RTX 5090", 99, True),
}


SPILLS = {
    ("experts: down", 100): 8,
    ("indexer_topk: score_shared", 80): 16,
    ("indexer_topk: score_shared", 120): 16,
    ("sparse_attention: attend", 90): 32,
}
"""Bytes per thread that a kernel may spill on an architecture; docs/compatibility.md has the reasons."""


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs."""

    registers: int
    shared: int
    """Bytes per program."""
    spilled: int
    """Bytes per thread of local memory: spilled registers, and arrays that no register could hold."""


@dataclass(frozen=True)
class Row:
    """One line of the result; whatever compiles something, Triton or not, produces these."""

    kernel: str
    configuration: str
    arch: int
    usage: Usage | None
    broken: tuple[str, ...]
    triton: str = ""
    """The version of Triton that compiled it; empty for nvcc."""


def violations(usage: Usage, arch: int, kernel: str = "") -> list[str]:
    """The bounds of `arch` that `kernel` breaks."""
    allowed = ARCHS[arch].shared_kb * 1024
    broken = []
    if usage.shared > allowed:
        broken.append(f"needs {usage.shared} bytes of shared memory, there are {allowed}")
    if usage.spilled > SPILLS.get((kernel, arch), 0):
        broken.append(f"spills {usage.spilled} bytes per thread")
    return broken


def write_rows(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    rows = []
    for values in json.loads(path.read_text(encoding="utf-8")):
        usage = values["usage"] and Usage(**values["usage"])
        rows.append(Row(**{**values, "usage": usage, "broken": tuple(values["broken"])}))
    return rows


def tritons_of(rows: Sequence[Row]) -> list[str]:
    """The versions of Triton that compiled the rows, in their order."""
    return list(dict.fromkeys(row.triton for row in rows if row.triton))


def as_table(rows: Sequence[Row], archs: Sequence[int]) -> str:
    """Markdown: a line per kernel and configuration, a column per architecture."""
    cells: dict[tuple[str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row.kernel, row.configuration][row.arch].append(row)
    versions = tritons_of(rows)
    lines = [["kernel", "configuration", *(f"sm_{arch}" for arch in archs)]]
    for (kernel, configuration), by_arch in sorted(cells.items(), key=lambda item: item[0][0]):
        lines.append([kernel, configuration or "all", *(_cell(by_arch.get(arch, []), versions) for arch in archs)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cell(rows: Sequence[Row], versions: Sequence[str]) -> str:
    """Registers and shared memory; where the versions of Triton differ, a value for each, and `-` for none."""
    if not rows:
        return ""
    by_version = {row.triton: row for row in rows}
    shown = [by_version.get(version) for version in versions] if rows[0].triton else list(rows)
    registers = _each(shown, lambda usage: str(usage.registers))
    shared = _each(shown, lambda usage: f"{usage.shared / 1024:.1f}")
    spilled = max((row.usage.spilled for row in rows if row.usage), default=0)
    return f"{registers} · {shared} KB" + (f" · {spilled} B SPILLED" if spilled else "")


def _each(rows: Sequence[Row | None], value: Callable[[Usage], str]) -> str:
    values = ["-" if row is None else "FAILS" if row.usage is None else value(row.usage) for row in rows]
    return values[0] if len(set(values)) == 1 else "/".join(values)


def document(rows: Sequence[Row], archs: Sequence[int], common: bool) -> str:
    """The table as a page of the documentation."""
    if common:
        what = "in bf16 on one rank: 8 requests decoding, or a prefill of 8192 tokens"
    else:
        what = "decoding 1, 8 and 128 tokens and prefilling 8192, on 1, 2, 4 and 8 tensor-parallel ranks"
    limits = "\n".join(
        f"| sm_{arch} | {ARCHS[arch].gpus} | {ARCHS[arch].shared_kb} KB | "
        f"{'converted by the GPU' if ARCHS[arch].native_fp8 else 'bit arithmetic'} |"
        for arch in archs
    )
    versions = tritons_of(rows)
    differ = " Where they differ, it has a value for each, in this order." if len(versions) > 1 else ""
    return f"""# What each kernel needs

Written by `make compile-table` with Triton {" and ".join(versions)}, which compiles every kernel ahead of time at the
shapes of DeepSeek-V4-Flash, {what}.
A cell holds the registers of a thread and the shared memory of a program.{differ}
The command fails if a kernel needs more shared memory than there is, or spills more registers than
[compatibility.md](compatibility.md) lists.

| | GPUs | shared memory | e4m3 |
|---|---|---|---|
{limits}

A kernel is named after its file in `ops/triton/`, and its function where that has another name; those of `csrc/` are
compiled by nvcc. A configuration names the axes that matter to it (op: the one that launches it; tp: ranks; shared:
whether the shared expert is fused with the routed ones); where none does, it says "all".

{as_table(rows, archs)}
"""
