"""The report of a whole check: JSON, Markdown, and the summary that is printed last."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .parts import PARTS
from .results import PartResult

SHOWS = {part.name: part.shows for part in PARTS}


@dataclass
class CheckReport:
    """device: from `benchmarks.report.describe`. dry: nothing in it is a measurement."""

    dry: bool
    device: dict[str, str]
    command: list[str]
    budget: float
    parts: list[PartResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def title(self) -> str:
        return "GPU check: DRY RUN on a CPU, nothing is measured" if self.dry else "GPU check"

    @property
    def failed(self) -> list[str]:
        return [part.name for part in self.parts if part.status == "failed"]

    def write(self, out: Path) -> list[Path]:
        """Write both forms to `out`; returns their paths. Files of a dry run have another name."""
        stem = "dry-run" if self.dry else "gpu-check"
        paths = [out / f"{stem}.json", out / f"{stem}.md"]
        for path, text in zip(paths, (self.as_json(), self.as_markdown()), strict=True):
            partial = path.with_suffix(".partial")
            partial.write_text(text)
            os.replace(partial, path)
        return paths

    def as_json(self) -> str:
        return json.dumps({"title": self.title, **asdict(self), "failed": self.failed}, indent=1) + "\n"

    def as_markdown(self) -> str:
        lines = [f"# {self.title}", "", *(f"- {name}: {value}" for name, value in self.device.items())]
        lines += [
            f"- command: `{' '.join(['python -m checks.gpu_check', *self.command])}`",
            f"- {self.seconds:.0f} s of a budget of {self.budget:.0f}", "", *self.summary(),
        ]  # fmt: skip
        for part in self.parts:
            lines += ["", f"## {part.name}", "", *_part(part)]
        return "\n".join(lines) + "\n"

    def summary(self) -> list[str]:
        """The table of all parts."""
        rows = []
        for part in self.parts:
            counts = part.counts()
            cases = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
            rows.append([part.name, part.status, cases, f"{part.seconds:.0f} s", part.reason])
        return table(["part", "status", "cases", "time", "why"], rows)


def _part(part: PartResult) -> list[str]:
    lines = [f"{SHOWS.get(part.name, '')}: **{part.status}**{f' ({part.reason})' if part.reason else ''}"]
    lines += [line for note in part.notes for line in ("", note)]
    if part.checks:
        rows = [[check.name, check.status, f"{check.seconds:.1f} s", check.detail] for check in part.checks]
        lines += ["", *table(["case", "status", "time", "found"], rows)]
    for each in part.tables:
        lines += ["", f"### {each.title}", "", *table(each.head, each.rows)]
        lines += ["", each.note] if each.note else []
    if part.log:
        lines += ["", "The end of its output:", "", "```", part.log.replace("```", "'''"), "```"]
    return lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are aligned as text too."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    # The last column is not padded.
    widths[-1] = 3
    cells.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
