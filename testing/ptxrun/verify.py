"""Runs an op's compiled kernels in several orders of warps and blocks: no findings, and the same bits each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .executable import Fault, Finding, Schedule, WarpOrder
from .triton_kernels import Run

SCHEDULES = (
    Schedule(),
    Schedule(WarpOrder.BACKWARD, blocks_backward=True, check_every=0),
    Schedule(WarpOrder.ALTERNATING, check_every=0),
)
"""Accesses to shared memory are checked once: what is found does not depend on the order."""


class Execute(Protocol):
    """`triton_kernels.executed` or `cuda_kernels.executed`, all but the schedule given."""

    def __call__(self, *, schedule: Schedule | None = None) -> AbstractContextManager[list[Run]]: ...


@dataclass(frozen=True)
class Harmless:
    """A finding that is expected."""

    fault: Fault
    file: str
    """Of the source, at its end."""
    reason: str

    def covers(self, finding: Finding) -> bool:
        return finding.fault is self.fault and finding.source is not None and finding.source[0].endswith(self.file)


HARMLESS = (
    Harmless(
        Fault.WARP_HAZARD,
        "triton/language/standard.py",
        "Triton stores a replicated `tl.sum(a * b)` from every lane that holds it. Fused multiply-adds make the "
        "replicas differ by one rounding; whichever remains is correct.",
    ),
)


def verified(
    compute: Callable[[], Any], execute: Execute, schedules: tuple[Schedule, ...] = SCHEDULES
) -> tuple[Any, list[Run]]:
    """What `compute` returns (tensors, maybe nested in tuples), and the launches of the first schedule.

    Raises:
        AssertionError: nothing was launched, a launch has findings, or results depend on the order.
    """
    first: tuple[Any, list[Run]] | None = None
    for schedule in schedules:
        with execute(schedule=schedule) as runs:
            out = compute()
        assert runs, "nothing was launched"
        found = [f"{run.kernel}: {finding}" for run in runs for finding in unexpected(run)]
        assert not found, "\n".join(found)
        if first is None:
            first = out, runs
        for actual, expected in zip(_tensors(out), _tensors(first[0]), strict=True):
            assert torch.equal(_bytes(actual), _bytes(expected)), f"results depend on the order: {schedule}"
    assert first is not None
    return first


def unexpected(run: Run) -> list[Finding]:
    """The launch's findings that are not known to be harmless."""
    return [finding for finding in run.result.findings if not any(known.covers(finding) for known in HARMLESS)]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
