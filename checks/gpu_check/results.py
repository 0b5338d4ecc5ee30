"""The results of a part: its process writes them after every case, and the process that started it reads them."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "not run"]

DRY = "dry run"
"""Replaces a measurement."""


class NotRunError(Exception):
    """Why something cannot run here; not a failure."""


class FailedError(AssertionError):
    """A result is wrong."""


@dataclass
class Check:
    """One case. seconds: its duration, including imports and engine starts."""

    name: str
    status: Status
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Table:
    """Cells are text: a number is formatted where it is measured, and its unit is in the head."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


@dataclass
class PartResult:
    """The process that started the part sets status and reason."""

    name: str
    status: Status = "not run"
    reason: str = ""
    seconds: float = 0.0
    limit: float | None = None
    """Seconds after which the part is killed."""
    running: str = ""
    """The case that was running when this was written."""
    finished: bool = False
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """Other contents of the JSON report."""
    log: str = ""
    """The end of the part's output, if something is wrong with it."""

    def counts(self) -> dict[str, int]:
        return {s: sum(check.status == s for check in self.checks) for s in ("passed", "failed", "not run")}

    @classmethod
    def read(cls, path: Path, name: str) -> PartResult:
        """What the part wrote last, or an empty result."""
        if not path.exists():
            return cls(name)
        stored = json.loads(path.read_text())
        checks, tables = ([kind(**each) for each in stored.pop(key)] for key, kind in _NESTED.items())
        return cls(**stored, checks=checks, tables=tables)

    def write(self, path: Path) -> None:
        """Write atomically: another process may read at any time."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(partial, path)


_NESTED: dict[str, Any] = {"checks": Check, "tables": Table}


class Recorder:
    """Runs the cases of one part in the part's process, and writes the result after each.

    Args:
        path: of the result.
        seconds: how long this part may take; a case that needs more than what is left is not started.
        dry: on a CPU with tiny shapes: everything runs, nothing is measured.
    """

    def __init__(
        self, name: str, path: Path, seconds: float, dry: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.result, self.path, self.dry, self.clock = PartResult(name), path, dry, clock
        self.seconds, self.deadline = seconds, clock() + seconds
        self.write()

    @property
    def left(self) -> float:
        """Seconds until this part's limit."""
        return self.deadline - self.clock()

    def write(self) -> None:
        self.result.write(self.path)

    def attempt(self, name: str, case: Callable[[], str | None], needs: float = 0.0) -> bool:
        """Run one case, which returns its result as one line of text; returns whether it passed.

        Args:
            needs: the case is "not run" if fewer seconds are left. A dry run requires only that any are left.
        """
        if self.left < (0.0 if self.dry else needs):
            left = max(0.0, self.left)
            return self.skip(name, f"{left:.0f} of {self.seconds:.0f} s are left, it may take {needs:.0f}")
        around, self.result.running, started = self.result.running, name, self.clock()
        self.write()
        check = Check(name, "passed")
        try:
            check.detail = case() or ""
        except NotRunError as error:
            check.status, check.detail = "not run", str(error)
        except Exception as error:  # a failed case must not stop the others; it is recorded, and the part fails
            traceback.print_exc()
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            check.status, check.detail = "failed", kind + shortened(str(error) or repr(error))
        check.seconds, self.result.running = round(self.clock() - started, 1), around
        self.result.checks.append(check)
        print(f"{name}: {check.status}: {check.detail}", flush=True)
        self.write()
        return check.status == "passed"

    def skip(self, name: str, reason: str) -> bool:
        self.result.checks.append(Check(name, "not run", reason))
        print(f"{name}: not run: {reason}", flush=True)
        self.write()
        return False

    def table(self, title: str, head: Sequence[str], note: str = "") -> Table:
        """A table of the report, to be filled row by row: a new one, or the one with this title."""
        for table in self.result.tables:
            if table.title == title:
                return table
        self.result.tables.append(Table(title, list(head), note=note))
        return self.result.tables[-1]

    def figure(self, value: float | None, form: str = ".1f") -> str:
        """A measured number as text; DRY in a dry run."""
        if self.dry:
            return DRY
        return "" if value is None else format(value, form)

    def finish(self) -> None:
        self.result.finished = True
        self.write()


def shortened(text: str, most: int = 1200) -> str:
    """One line; of a long text the beginning and the end."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
