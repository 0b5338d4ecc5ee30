"""The part `peer`: vLLM's own DeepSeek-V4 at the widths, layers and points of `width`, with FP4 and FP8 weights.

If it cannot run, on GPUs older than SM90 or without FlashMLA or DeepGEMM, that is reported and is not a failure. A dry
run uses our model in its place.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vllm_deepseek_v4flash import DISABLE_ENV

from .results import NotRunError, Recorder

TITLE = "vLLM's own"


def run(recorder: Recorder) -> None:
    if recorder.dry:
        recorder.result.notes.append("A dry run uses our model: vLLM's does not run on a CPU.")
    else:
        # Before vLLM looks for plugins.
        os.environ[DISABLE_ENV] = "1"
        require()
    with tempfile.TemporaryDirectory() as scratch:
        recorder.attempt("engine", lambda: measure(recorder, Path(scratch)))


def require() -> None:
    """NotRunError with what vLLM's own model needs and does not find."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise NotRunError(f"vLLM's own DeepSeek-V4 needs SM90 or newer, this is SM{major}{minor}")
    try:
        from vllm.utils.deep_gemm import has_deep_gemm
        from vllm.v1.attention.ops.flashmla import is_flashmla_sparse_supported
    except ImportError as error:
        raise NotRunError(f"vLLM's own DeepSeek-V4 needs a module that cannot be imported: {error}") from error
    supported, reason = is_flashmla_sparse_supported()
    if not supported:
        raise NotRunError(f"vLLM's own DeepSeek-V4 needs FlashMLA: {reason}")
    if not has_deep_gemm():
        raise NotRunError("vLLM's own DeepSeek-V4 scores its indexer's keys with DeepGEMM, which this vLLM lacks")


def measure(recorder: Recorder, scratch: Path) -> str:
    from . import random_model, width
    from .timed import TimedEngine

    points = width.Points((40,), (1,), (24,)) if recorder.dry else width.FLASH
    bench = width.prepare(recorder, scratch, points)
    directory = random_model.write(scratch / "model", bench.shape, native=True)
    with width.engine(directory, width.engine_options(bench, {})) as llm:
        name = type(llm.apply_model(lambda model: model)[0]).__module__
        if not recorder.dry and name.startswith("vllm_deepseek_v4flash"):
            raise AssertionError(f"vLLM took {name} although {DISABLE_ENV} is set")
        timed = TimedEngine(llm, recorder.dry)
        width.add_prefills(bench, timed, f"{TITLE} prefill")
        if not recorder.dry:
            bench.head = width.head_ms(llm, bench)
        width.add_decodes(bench, timed, f"{TITLE} decode")
        return f"{bench.shape.count} layers, {name}"
