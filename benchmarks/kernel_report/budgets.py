"""What a decoding step may cost at most, counted in the compiled code: `tests/ops/compiled/test_budgets.py` compares.

A change that needs more fails with both figures. One that needs less lowers the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_deepseek_v4flash.config import LayerKind

from .document import instructions_per_unit, launches_of
from .layer import Point
from .trace import Call, Profile

POINT, ARCH, RANKS = Point(8, 1 << 13), 80, 2
"""Eight requests at 8k on two A100s."""
LAUNCHES = {LayerKind.WINDOW: 23, LayerKind.CSA: 30, LayerKind.HCA: 24}
"""Of a layer, without all-reduces."""
INSTRUCTIONS = {"packed_experts": 2.6, "packed_linear": 8.5}
"""Of threads for each int4 weight."""
WASTED = {"gate_up": 0.01, "down": 0.01, "_linear": 0.56}
"""The part of the bytes moved from global memory that no thread asked for, by kernel."""


def exceeded(kind: LayerKind, calls: Sequence[Call]) -> list[str]:
    """A sentence for each budget that a layer exceeds, with both figures."""
    found = []
    if launches_of(calls) > LAUNCHES[kind]:
        found.append(f"{kind.name}: {launches_of(calls)} launches, the budget is {LAUNCHES[kind]}")
    for call in calls:
        if call.op in INSTRUCTIONS and instructions_per_unit(call) > INSTRUCTIONS[call.op]:
            issued = instructions_per_unit(call)
            found.append(f"{call.op}: {issued:.2f} instructions a weight, the budget is {INSTRUCTIONS[call.op]}")
        for launch in call.launches:
            if isinstance(launch, Profile) and launch.traffic.wasted > WASTED.get(launch.kernel, 1.0):
                wasted, budget = launch.traffic.wasted, WASTED[launch.kernel]
                found.append(f"{launch.kernel}: {wasted:.0%} of its traffic is wasted, the budget is {budget:.0%}")
    return found
