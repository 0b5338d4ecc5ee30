"""A decoding step costs no more than its budgets, and the report's numbers are consistent."""

import dataclasses

import pytest

from benchmarks.flash_cases import WEIGHTS
from benchmarks.kernel_report import budgets, estimate
from benchmarks.kernel_report.document import Traced, document
from benchmarks.kernel_report.plot import bars
from benchmarks.kernel_report.trace import AllReduce, Profile, Tracer
from testing.poison import without_poison
from testing.ptxrun import cuda_kernels
from vllm_deepseek_v4flash.config import LayerKind


@pytest.fixture(scope="module")
def layers():
    if cuda_kernels.nvcc() is None:
        pytest.skip("needs nvcc")
    tracer = Tracer(budgets.ARCH, budgets.RANKS, WEIGHTS["int4"])
    with without_poison():
        return {kind: tracer.trace(kind, budgets.POINT) for kind in LayerKind}


@pytest.mark.parametrize("kind", LayerKind)
def test_budgets(layers, kind):
    assert not budgets.exceeded(kind, layers[kind])


def test_an_exceeded_budget_is_told_with_both_figures(layers, monkeypatch):
    monkeypatch.setitem(budgets.LAUNCHES, LayerKind.CSA, 1)
    monkeypatch.setitem(budgets.INSTRUCTIONS, "packed_experts", 0.5)
    monkeypatch.setitem(budgets.WASTED, "_linear", 0.0)
    launches, *_ = told = budgets.exceeded(LayerKind.CSA, layers[LayerKind.CSA])
    assert launches.startswith("CSA: ")
    assert launches.endswith("launches, the budget is 1")
    assert any("instructions a weight, the budget is 0.5" in text for text in told)
    assert any("the budget is 0%" in text for text in told)


def test_a_layer_runs_the_kernels_of_its_kind(layers):
    ops = {kind: {call.op for call in calls} for kind, calls in layers.items()}
    assert ops[LayerKind.CSA] - ops[LayerKind.HCA] == {"indexer_topk"}
    assert ops[LayerKind.HCA] - ops[LayerKind.WINDOW] == {"compress", "merged_linear"}
    for calls in layers.values():
        launches = [launch for call in calls for launch in call.launches]
        assert [launch.bytes for launch in launches if isinstance(launch, AllReduce)] == [8 * 4096 * 2, 8 * 4096 * 4]
        kernels = [launch.kernel for launch in launches if isinstance(launch, Profile)]
        assert kernels[-3:] == ["prepare", "gate_up", "down"]  # csrc/'s
        assert all(launch.instructions > 0 for launch in launches if isinstance(launch, Profile))


def test_experts_move_the_bytes_of_the_chosen_experts(layers):
    """Codes and scales of gate_up: between those of the drawn experts and a tenth more, for x and the routing."""
    (call,) = (call for call in layers[LayerKind.CSA] if call.op == "packed_experts")
    gate_up = call.launches[1]
    least = call.units * 2 / 3 * (0.5 + 2 / 128)
    assert least * 0.9 <= gate_up.traffic.moved <= least * 1.1


def test_the_estimate_adds_up(layers):
    machine = estimate.MACHINES[0]
    step = estimate.step(machine, budgets.POINT, layers)
    counts = estimate.layer_counts()
    assert counts == {LayerKind.WINDOW: 2, LayerKind.CSA: 21, LayerKind.HCA: 20}
    each = {
        kind: sum(estimate.launch_us(launch, machine) for call in calls for launch in call.launches)
        for kind, calls in layers.items()
    }
    assert step.us == pytest.approx(sum(counts[kind] * each[kind] for kind in each) + step.families["head"])
    assert step.us > step.floor_us
    slower = dataclasses.replace(machine, gpu=dataclasses.replace(machine.gpu, dram_gb=machine.gpu.dram_gb / 10))
    assert estimate.step(slower, budgets.POINT, layers).us > 2 * step.us


def test_the_report_says_that_times_are_estimates(layers):
    machine = estimate.MACHINES[0]
    traced = Traced(machine, budgets.POINT, "int4", layers, estimate.step(machine, budgets.POINT, layers))
    text = document([traced])
    assert "Nothing here was measured on a\nGPU" in text
    assert "packed_experts: gate_up" in text
    rows = [("2x A100", {name: us / 1e3 for name, us in traced.step.families.items()}, traced.step.floor_us / 1e3)]
    drawn = bars("steps", rows)
    assert drawn.startswith("<svg")
    assert drawn.count("<rect") == 1 + 2 * len(estimate.FAMILIES)
