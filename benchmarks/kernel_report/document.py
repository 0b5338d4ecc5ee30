"""The kernel report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import triton

from testing.ptxrun.gpus import Gpu
from testing.ptxrun.profile import Profile
from vllm_deepseek_v4flash.config import LayerKind

from .estimate import (
    DRAM_SHARE,
    FAMILIES,
    LAUNCH_US,
    MOST_ISSUED,
    PER_WARP,
    PRODUCT_SHARE,
    Machine,
    Step,
    limit,
    memory_gb,
)
from .host import Host
from .layer import Point
from .trace import MOST_BLOCKS, MOST_PREFILL_BLOCKS, AllReduce, Call

LANES = 32
UNITS = {
    "packed_experts": "4-bit weight",
    "packed_linear": "4-bit weight",
    "sparse_attention": "head and key",
    "indexer_topk": "index entry",
}
"""What an op's work is counted in."""
DETAILED = (80, 90)
"""Architectures whose kernels are listed one by one, at these points."""
DETAILED_POINTS = (Point(1, 1 << 13), Point(8, 1 << 13), Point(32, 1 << 13), Point(1, 1 << 20), Point(new=8192))
MARLIN = """For comparison: vLLM's Marlin MoE kernel for int4, bf16, groups of 128 and tiles of 8 tokens, read from the
machine code for sm_80 in the wheel of vLLM 0.33.0 (`cuobjdump -sass`). Its loop over four stages has 757 instructions
for 32 products of 16 x 16 weights: at most 3.0 per weight, without its start and the sums at a tile's end, which the
counts of our kernels contain. It was not executed.
"""
Layers = Mapping[LayerKind, Sequence[Call]]


@dataclass(frozen=True)
class Traced:
    """The layers of one machine and point."""

    machine: Machine
    point: Point
    weight: str
    """How the weights are packed, as in `benchmarks/flash_cases.py`."""
    layers: Layers
    step: Step
    host: Host | None = None
    """What a decoding step of 43 layers without CUDA graphs costs on the machine that wrote the report."""

    def profiles(self) -> Iterator[tuple[Call, Profile]]:
        """The launches of our own kernels, each with the op that it belongs to."""
        for calls in self.layers.values():
            for call in calls:
                for launch in call.launches:
                    if isinstance(launch, Profile):
                        yield call, launch


def document(traced: Sequence[Traced]) -> str:
    """The whole page."""
    return "\n".join([
        _head(),
        "## A whole step (estimate)\n",
        _steps(traced),
        "![An estimated step by family](kernel-report.svg)\n",
        "## Launches per layer\n",
        _launches(traced),
        "## Kernels\n",
        _kernels(traced),
        "## Wasted traffic and bank conflicts\n",
        _worst(traced),
    ])  # fmt: skip


def _head() -> str:
    return f"""# What the compiled kernels do

Written by `make kernel-report` with Triton {triton.__version__}. Every kernel of a step is compiled at
DeepSeek-V4-Flash's real widths, executed on a CPU (`testing/ptxrun`) and counted. **Nothing here was measured on a
GPU: counts are counts, times are estimates.**

How an estimate is made (`benchmarks/kernel_report/estimate.py`): a launch takes {LAUNCH_US:.0f} us plus the longest of

- the bytes that DRAM must move, at {DRAM_SHARE:.0%} of the data sheet's bandwidth;
- each unit's instructions on the busiest multiprocessor, at the unit's full rate;
- all instructions, of which a scheduler issues {PER_WARP} a clock for each warp that it holds, up to {MOST_ISSUED}.

Launches do not overlap, and all are inside one CUDA graph. PyTorch's products reach {PRODUCT_SHARE:.0%} of the tensor
cores' rate. vLLM's scheduler, sampling and the draft of speculative decoding are not in it. Steps that do not fit into
the GPUs' memory are marked. Machine instructions are those that ptxas emits, each source line as often as its PTX ran
(`testing/ptxrun/machine_code.py`). Of a grid of more than {MOST_BLOCKS} blocks ({MOST_PREFILL_BLOCKS} in prefill) a
sample ran, spread over its rows and columns, and counts are scaled to the grid; the kernels' table says how many ran.
Experts are drawn at random. A decoding step completes no compressed entry.
"""


def _steps(traced: Sequence[Traced]) -> str:
    families = [f"{name} ms" for name in FAMILIES]
    rows = [["machine", "weights", "step", "ms", "floor ms", "GB per GPU", "launches", *families]]
    for each in traced:
        step = each.step
        rows.append([
            str(each.machine), each.weight, str(each.point), f"**{step.us / 1e3:.2f}**", f"{step.floor_us / 1e3:.2f}",
            _memory(each), f"{step.launches}", *(f"{step.families[name] / 1e3:.2f}" for name in FAMILIES),
        ])  # fmt: skip
    return (
        _table(rows) + "\nThe floor is what no implementation avoids (`benchmarks/floor.py`): each weight and row read "
        "once, at the data sheet's bandwidth and tensor rate, divided over the ranks without communication. GB per GPU "
        "are the weights' part and the cached entries, without workspaces.\n"
    )


def _memory(each: Traced) -> str:
    """What a step needs of a GPU's memory, and whether that is too much."""
    needed, held = memory_gb(each.machine, each.point), each.machine.gpu.memory_gb
    return f"{needed:.0f} of {held}" + (", **does not fit**" if needed > held else "")


def _launches(traced: Sequence[Traced]) -> str:
    rows = [["machine", "weights", "step", *(kind.name for kind in LayerKind), "43 layers", "calls", "ms of Python"]]
    for each in traced:
        counts = [launches_of(each.layers[kind]) for kind in LayerKind]
        host = ("", "") if each.host is None else (f"{each.host.calls:,}", f"{each.host.us / 1e3:.0f}")
        rows.append([
            str(each.machine), each.weight, str(each.point), *map(str, counts), str(each.step.launches), *host,
        ])  # fmt: skip
    return _table(rows) + (
        "\nAll-reduces come on top, two a layer. Calls of Python functions, and of C functions from Python, start a "
        "step's launches where there is no CUDA graph; the time is CPU time of the machine that wrote this report, "
        "without Triton's launcher.\n"
    )


def launches_of(calls: Sequence[Call]) -> int:
    """Kernels that a layer starts, PyTorch's included, without all-reduces."""
    return sum(not isinstance(launch, AllReduce) for call in calls for launch in call.launches)


def instructions_per_unit(call: Call) -> float:
    """Machine instructions of threads for each unit of the op's work."""
    issued = sum(launch.instructions for launch in call.launches if isinstance(launch, Profile))
    return LANES * issued / call.units


def _kernels(traced: Sequence[Traced]) -> str:
    rows = [[
        "machine", "weights", "step", "op: kernel", "blocks", "of them run", "warps", "registers", "shared KB",
        "per SM", "waves", "KB in flight per SM", "instructions per unit", "mix", "sectors per request", "wasted",
        "bank conflicts", "limit", "us at least",
    ]]  # fmt: skip
    for each in traced:
        if each.machine.gpu.arch not in DETAILED or each.point not in DETAILED_POINTS:
            continue
        found: dict[tuple[str, ...], tuple[str, ...]] = {}
        for call, launch in each.profiles():
            packed = call.op.startswith("packed_")
            if each.weight == "int4" or packed:  # formats differ in these ops alone
                row = tuple(_kernel(each.machine.gpu, call, launch))
                # Layers draw other experts.
                found.setdefault(row[:2] if call.op == "packed_experts" else row, row)
        rows += [[str(each.machine), each.weight, str(each.point), *row] for row in found.values()]
    units = ", ".join(f"{op}: {unit}" for op, unit in UNITS.items())
    return _table(rows) + (
        f"\nUnits of the op's work, all its launches together: {units}. Instructions are those of threads. Bytes in "
        f"flight are those of asynchronous copies.\n\n{MARLIN}"
    )


def _kernel(gpu: Gpu, call: Call, launch: Profile) -> list[str]:
    resident, traffic = launch.resident(gpu), launch.traffic
    total = launch.instructions
    mix = sorted(launch.issued.items(), key=lambda item: -item[1])[:4]
    per_unit = f"{LANES * total / call.units:.2f}" if call.units else ""
    unit, least = limit(launch, gpu)
    return [
        f"{call.op}: {launch.kernel.lstrip('_')}", str(launch.blocks), str(launch.ran), str(launch.warps),
        str(launch.registers), f"{launch.shared / 1024:.1f}", str(resident), f"{launch.waves(gpu):.2f}",
        f"{launch.in_flight * min(resident, -(-launch.blocks // gpu.multiprocessors)) / 1024:.0f}", per_unit,
        ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in mix),
        f"{traffic.sectors / max(traffic.requests, 1):.1f}", f"{traffic.wasted:.0%}",
        f"{launch.wavefronts / launch.ideal_wavefronts:.2f}" if launch.ideal_wavefronts else "", unit, f"{least:.1f}",
    ]  # fmt: skip


def _worst(traced: Sequence[Traced]) -> str:
    lines: dict[str, None] = {}
    for each in traced:
        arch = each.machine.gpu.arch
        for _, launch in each.profiles() if arch in DETAILED else ():
            lines |= {f"- sm_{arch}, {launch.kernel.lstrip('_')}: {text}": None for text in launch.worst}
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)) + "\n"
