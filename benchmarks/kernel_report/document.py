"""The kernel report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import triton

from testing.ptxrun.gpus import GPUS
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
    launch_us,
    limits,
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
WAVES_ON = tuple(GPUS[name] for name in ("A100", "H100", "L40S", "RTX 5090"))
SMALL_US = 0.05
"""Bounds below are not listed."""
MARLIN = """vLLM's Marlin: the int4 kernel of `fused_marlin_moe` for bf16 and tiles of 8 tokens, both its launches. Its
PTX for sm_80, from vLLM's wheel on PyPI, is executed and counted as ours is, with the same experts
(`benchmarks/kernel_report/marlin.py`). What vLLM launches around it (sorting, activation, sum) is not counted.
"""
NO_MARLIN = """vLLM's Marlin kernel is not in this table: `ARGS="--marlin WHEEL"` counts it, for a wheel of vLLM 0.33.0.
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

    @property
    def fits(self) -> bool:
        """Whether the weights and the cached entries fit into the GPUs' memory."""
        return memory_gb(self.machine, self.point) <= self.machine.gpu.memory_gb

    def profiles(self) -> Iterator[tuple[Call, Profile]]:
        """The launches of our own kernels, each with the op that it belongs to."""
        for calls in self.layers.values():
            for call in calls:
                for launch in call.launches:
                    if isinstance(launch, Profile):
                        yield call, launch


def document(traced: Sequence[Traced], marlin: Sequence[Traced] = ()) -> str:
    """The whole page; `marlin`: vLLM's kernels for the experts, counted in the same way."""
    return "\n".join([
        _head(),
        "## A whole step (estimate)\n",
        _steps(traced),
        "![Estimated decoding steps by family](kernel-report.svg)\n",
        "![Estimated prompts by family](kernel-report-prefill.svg)\n",
        "## Launches per layer\n",
        _launches(traced),
        "## Kernels\n",
        _kernels(traced, marlin),
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
    return f"{needed:.0f} of {held}" + ("" if each.fits else ", **does not fit**")


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


def _kernels(traced: Sequence[Traced], marlin: Sequence[Traced]) -> str:
    rows = [[
        "machine", "weights", "steps", "op: kernel", "blocks", "of them run", "warps", "registers", "shared KB",
        "per SM", f"waves on {'/'.join(str(gpu.multiprocessors) for gpu in WAVES_ON)} SMs", "KB in flight per SM",
        "instructions per unit", "mix", "sectors per request", "wasted", "bank conflicts", "us at least, by unit",
        "us (estimate)",
    ]]  # fmt: skip
    found: dict[tuple[str, ...], dict[Point, None]] = {}
    for each in (*traced, *marlin):
        for call, launch in each.profiles():
            # Formats differ in these ops alone.
            if each.weight == "int4" or call.op.startswith("packed_"):
                row = (str(each.machine), each.weight, *_kernel(each.machine, call, launch))
                found.setdefault(row, {})[each.point] = None
    rows += [[*row[:2], _joined(list(points)), *row[2:]] for row, points in found.items()]
    units = ", ".join(f"{op}: {unit}" for op, unit in UNITS.items())
    return _table(rows) + (
        f"\nSteps whose launches do not differ share a line. Units of the op's work, its launches together: {units}."
        " Instructions are those of threads. Bytes in flight are those of asynchronous copies. Waves are those of this "
        f"architecture's kernel on {', '.join(gpu.name for gpu in WAVES_ON)}. A bound is what a unit needs at its full "
        "rate; DRAM and issue at the rates above, which are assumptions.\n\n" + (MARLIN if marlin else NO_MARLIN)
    )


def _joined(points: Sequence[Point]) -> str:
    """Decoding steps by batch, with all their contexts; prompts."""
    decode: dict[int, list[str]] = {}
    for point in points:
        if not point.prefill:
            decode.setdefault(point.requests, []).append(f"{point.context >> 10}k")
    batches = [f"batch {requests}, {'/'.join(contexts)}" for requests, contexts in decode.items()]
    return "; ".join([*batches, *(str(point) for point in points if point.prefill)])


def _kernel(machine: Machine, call: Call, launch: Profile) -> list[str]:
    gpu, traffic = machine.gpu, launch.traffic
    resident, total = launch.resident(gpu), launch.instructions
    mix = sorted(launch.issued.items(), key=lambda item: -item[1])[:5]
    per_unit = f"{LANES * total / call.units:.2f}" if call.units else ""
    bounds = sorted(limits(launch, gpu).items(), key=lambda item: -item[1])
    return [
        f"{call.op}: {launch.kernel.lstrip('_')}", str(launch.blocks), str(launch.ran), str(launch.warps),
        str(launch.registers), f"{launch.shared / 1024:.1f}", str(resident),
        "/".join(f"{launch.waves(other):.2f}" for other in WAVES_ON),
        f"{launch.in_flight * min(resident, -(-launch.blocks // gpu.multiprocessors)) / 1024:.0f}", per_unit,
        ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in mix),
        f"{traffic.sectors / max(traffic.requests, 1):.1f}", f"{traffic.wasted:.0%}",
        f"{launch.wavefronts / launch.ideal_wavefronts:.2f}" if launch.ideal_wavefronts else "",
        ", ".join(f"{unit} {us:.1f}" for unit, us in bounds if us >= SMALL_US),
        f"{launch_us(launch, machine):.1f}",
    ]  # fmt: skip


def _worst(traced: Sequence[Traced]) -> str:
    """Each place once, as the first step has it."""
    lines: dict[tuple[int, str, str], str] = {}
    for each in traced:
        arch = each.machine.gpu.arch
        for _, launch in each.profiles():
            for text in launch.worst:
                line = f"- sm_{arch}, {launch.kernel.lstrip('_')}: {text}"
                lines.setdefault((arch, launch.kernel, text.partition(": ")[2]), line)
    return "\n".join(lines.values()) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)) + "\n"
