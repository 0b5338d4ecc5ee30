"""What a decoding step may cost at most, counted in the compiled code: `tests/ops/compiled/test_budgets.py` compares.

A change that needs more fails with both figures. One that needs less lowers the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_deepseek_v4flash.config import LayerKind

from .document import UNITS, instructions_per_unit, launches_of
from .layer import Point
from .trace import Call, Profile

POINT, ARCH, RANKS = Point(8, 1 << 13), 80, 2
"""Eight requests at 8k on two A100s."""
LAUNCHES = {LayerKind.WINDOW: 23, LayerKind.CSA: 30, LayerKind.HCA: 24}
"""Of a layer, without all-reduces."""
INSTRUCTIONS = {"packed_experts": 2.6, "packed_linear": 8.5, "sparse_attention": 1920, "indexer_topk": 4220}
"""Of threads for each int4 weight, pair of a head and a key, and index entry."""
CALLS = {LayerKind.WINDOW: 1900, LayerKind.CSA: 2550, LayerKind.HCA: 2000}
"""Of Python functions, and of C functions from Python, that start a layer's launches: what a step without CUDA graphs
costs the host, in units that do not depend on the machine. Python 3.11 to 3.13 and versions of PyTorch differ by some
in a hundred, for which there is room; microseconds would be the machine's load."""
VARIANTS = 38
"""Kernels that Triton compiles during the first requests (`variants.py`), a second or more each."""
WASTED = {"gate_up": 0.01, "down": 0.01, "_linear": 0.56, "_attend": 0.19, "_mix_streams": 0.01, "_score_single": 0.01}
"""The part of the bytes moved from global memory that no thread asked for, by kernel."""


def exceeded(kind: LayerKind, calls: Sequence[Call]) -> list[str]:
    """A sentence for each budget that a layer exceeds, with both figures."""
    found = []
    if launches_of(calls) > LAUNCHES[kind]:
        found.append(f"{kind.name}: {launches_of(calls)} launches, the budget is {LAUNCHES[kind]}")
    for call in calls:
        if call.op in INSTRUCTIONS and instructions_per_unit(call) > INSTRUCTIONS[call.op]:
            issued = instructions_per_unit(call)
            unit, budget = UNITS[call.op], INSTRUCTIONS[call.op]
            found.append(f"{call.op}: {issued:.2f} instructions for each {unit}, the budget is {budget}")
        for launch in call.launches:
            if isinstance(launch, Profile) and launch.traffic.wasted > WASTED.get(launch.kernel, 1.0):
                wasted, budget = launch.traffic.wasted, WASTED[launch.kernel]
                found.append(f"{launch.kernel}: {wasted:.0%} of its traffic is wasted, the budget is {budget:.0%}")
    return found


def exceeded_variants(found: Mapping[Point, Sequence[str]]) -> list[str]:
    """A sentence if requests compile more kernels than the budget, by step."""
    total = sum(map(len, found.values()))
    steps = "; ".join(f"{point}: {', '.join(names)}" for point, names in found.items())
    return [f"{total} kernels are compiled during requests ({steps}), the budget is {VARIANTS}"] * (total > VARIANTS)


def exceeded_calls(kind: LayerKind, calls: int) -> list[str]:
    """A sentence if a layer exceeds its budget of the host's calls, with both figures."""
    return [f"{kind.name}: {calls} calls, the budget is {CALLS[kind]}"] if calls > CALLS[kind] else []
