"""Inspects an engine in this process: its model runner, and whether its steps are CUDA graphs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
DRY_SIZES = (1, 2, 4)
MODE = "FULL_AND_PIECEWISE"


def graph_options(dry: bool) -> dict[str, Any]:
    """For `vllm.LLM`: whole graphs of decoding steps, and for other steps graphs of the parts between attention.

    The mode is explicit, because without it the plugin runs eagerly on a GPU. A dry run has only the graphs of
    `imitate_graphs`.
    """
    if dry:
        return {"enforce_eager": True}
    compilation = {"cudagraph_mode": MODE, "cudagraph_capture_sizes": list(CAPTURE_SIZES)}
    return {"enforce_eager": False, "compilation_config": compilation}


def imitate_graphs(llm: Any) -> None:
    """Have an engine on a CPU capture its steps as recordings. Call this before `Steps`."""
    from testing.v2_on_cpu.cuda_graphs import capture

    capture(llm, MODE, list(DRY_SIZES))


def model_runner(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


class Steps:
    """Counts the steps of an engine by kind ("FULL", "PIECEWISE", "NONE": eager), and can make them eager."""

    def __init__(self, llm: Any) -> None:
        runner = model_runner(llm)
        if not llm.llm_engine.vllm_config.use_v2_model_runner:
            raise AssertionError("vLLM did not choose its V2 model runner")
        self.manager = runner.cudagraph_manager
        self.dispatch = self.manager.dispatch
        self.counts: Counter[str] = Counter()
        self.manager.dispatch = self._counted

    def _counted(self, *args: Any, **options: Any) -> Any:
        found = self.dispatch(*args, **options)
        self.counts[found.cg_mode.name] += 1
        return found

    @property
    def captured(self) -> int:
        """Whole-step graphs."""
        return len(self.manager.graphs)

    @contextlib.contextmanager
    def eagerly(self) -> Iterator[None]:
        """No step is a graph, as before any was captured, so one engine runs both ways."""
        before, self.manager._graphs_captured = self.manager._graphs_captured, False
        try:
            yield
        finally:
            self.manager._graphs_captured = before

    def taken(self) -> str:
        """The counts since the last call, as text."""
        counts, self.counts = self.counts, Counter()
        names = {"FULL": "whole graphs", "PIECEWISE": "piecewise", "NONE": "eager"}
        return ", ".join(f"{count} {names.get(mode, mode)}" for mode, count in sorted(counts.items())) or "no steps"
