"""The parts, in the order in which they run: what shows that the numbers are right before what shows the speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        shows: for the report.
        least: seconds below which it is not started.
        share: of the time that is left, against the shares of the parts that are still to come.
        optional: whether it may be impossible: it is never a failure.
    """

    name: str
    shows: str
    least: float
    share: float
    optional: bool = False


PARTS = (
    Part("engine", "small checkpoints in vLLM: tokens against the CPU's, eager and in CUDA graphs", 45, 8),
    Part("long", "one layer of each kind at 1,048,576 tokens of context, against the reference", 25, 2),
    Part("tests", "every test that is marked `gpu`", 40, 3),
    Part("width", "Flash's real widths through vLLM's engine: speed, where the time goes, memory", 60, 8),
    Part("peer", "vLLM's own DeepSeek-V4 at the same widths and layers", 50, 2, optional=True),
    Part("kernels", "the benchmarks of the attention and MoE kernels, vLLM's own beside ours", 30, 4),
)
NAMES = tuple(part.name for part in PARTS)
GRACE = 30.0
"""Seconds between the time that a part is told to be done by and its end by force."""


def seconds_for(part: Part, rest: list[Part], left: float) -> float:
    """How long a part may take of the seconds that are left for it and `rest`: what one does not use is the others'."""
    return left * part.share / sum(each.share for each in (part, *rest))
