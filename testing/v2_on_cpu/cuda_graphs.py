"""vLLM's CUDA graphs on a CPU: a capture records operations, and a replay repeats them on the same tensors.

A replay therefore does what a GPU's does: what the captured step decided on the host stays decided, and values that the
next step writes to other tensors than the captured ones are not seen. Operations whose result depends on data, which a
GPU's capture forbids, are refused here too. Unlike on a GPU, the memory of a capture is not reused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from vllm.compilation import breakable_cudagraph
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.attn_utils import get_attn_cg_support

from vllm_deepseek_v4flash.ops.cpu.recording import Recording
from vllm_deepseek_v4flash.ops.triton import launch


class CpuGraph:
    """The part of `torch.cuda.CUDAGraph` that vLLM uses."""

    made: ClassVar[list[CpuGraph]] = []

    def __init__(self) -> None:
        self.recording = Recording()
        self.replays = 0
        self._open = contextlib.ExitStack()
        CpuGraph.made.append(self)

    def capture_begin(self, **options: Any) -> None:
        self._open.enter_context(self.recording)
        self._open.enter_context(launch.recorded(launch.device_of(torch.empty(0)), self._launched))

    def capture_end(self) -> None:
        self._open.close()
        assert not self.recording.obstacle, f"a graph cannot capture {self.recording.obstacle}"

    def replay(self) -> None:
        self.replays += 1
        self.recording.replay()

    def _launched(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Run and record a Triton kernel. The torch calls of its interpreter are not part of the graph."""

        def run() -> None:
            if all(grid):
                kernel[grid](*args, **options)

        with _disable_current_modes():
            run()
        self.recording.calls.append((kernel.fn.__name__, run, ()))


@contextlib.contextmanager
def _graph(graph: CpuGraph, *pool: Any, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """vLLM captures into `CpuGraph`s during the `with` block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", CpuGraph)
        patch.setattr(torch.cuda, "graph", _graph)
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        patch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
        for module in (cudagraph_utils, breakable_cudagraph):
            patch.setattr(module, "capture_pool", lambda pool, config: contextlib.nullcontext())
        patch.setattr(cudagraph_utils, "graph_capture", lambda device: contextlib.nullcontext())
        patch.setattr(cudagraph_utils, "current_stream", lambda: None)
        # A GPU's capture owns its memory, so vLLM need not hold it.
        patch.setattr(breakable_cudagraph, "weak_ref_tensor", lambda tensor: tensor)
        patch.setattr(breakable_cudagraph, "weak_ref_tensors", lambda tensors: tensors)
        yield


def capture(llm: Any, mode: str, sizes: list[int]) -> cudagraph_utils.ModelCudaGraphManager:
    """Give a running engine of the V2 runner the graphs that it captures at its start on a GPU.

    Returns:
        The runner's new manager, with the mode that vLLM made of `mode` and the graphs of whole steps (`graphs`).
        `CpuGraph.made` has all graphs, including those between attention layers.
    """
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    config = runner.vllm_config.compilation_config
    config.cudagraph_mode, config.cudagraph_capture_sizes = CUDAGraphMode[mode], sizes
    config.max_cudagraph_capture_size = max(sizes)
    support = get_attn_cg_support(runner.attn_groups, runner.vllm_config)
    resolved = config.resolve_cudagraph_mode_and_sizes(
        support.min_cg_support, support.min_cg_attn_backend, runner.decode_query_len, use_v2_model_runner=True,
        kv_cache_config=runner.kv_cache_config, max_num_reqs=runner.max_num_reqs,
    )  # fmt: skip
    CpuGraph.made.clear()
    with capturing(), torch.inference_mode():
        manager = cudagraph_utils.ModelCudaGraphManager(
            runner.vllm_config, runner.device, resolved, decode_query_len=runner.decode_query_len
        )
        manager.capture(
            runner.model, runner.model_state, runner.input_buffers, runner.intermediate_tensors, runner.block_tables,
            runner.attn_groups, runner.kv_cache_config,
        )  # fmt: skip
    runner.cudagraph_manager = manager
    return manager
