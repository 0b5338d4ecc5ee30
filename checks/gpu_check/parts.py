"""The parts in the order in which they run: first correctness, then speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        shows: a description for the report.
        least: with fewer seconds left it is not started.
        share: of the remaining time, relative to the shares of the later parts.
        optional: it may be impossible on a machine and never fails the check.
    """

    name: str
    shows: str
    least: float
    share: float
    optional: bool = False


PARTS = (
    Part("engine", "small checkpoints in vLLM: tokens compared with the CPU's, eager and in CUDA graphs", 45, 8),
    Part("long", "one layer of each kind at 1,048,576 tokens of context, compared with the reference", 25, 2),
    Part("tests", "every test that is marked `gpu`", 40, 3),
    Part("width", "Flash's real widths through vLLM's engine: speed, where the time goes, memory", 60, 8),
    Part("peer", "vLLM's own DeepSeek-V4 at the same widths and layers", 50, 2, optional=True),
    Part("kernels", "the benchmarks of the attention and MoE kernels, with vLLM's own", 30, 4),
)
NAMES = tuple(part.name for part in PARTS)
GRACE = 30.0
"""Seconds between a part's time limit and its kill."""


def seconds_for(part: Part, rest: list[Part], left: float) -> float:
    """The time limit of a part, if `left` seconds are left for it and `rest`. Unused time goes to the later parts."""
    return left * part.share / sum(each.share for each in (part, *rest))
