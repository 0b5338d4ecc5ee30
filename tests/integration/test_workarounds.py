"""What the plugin changes in vLLM's configuration for its own model."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from testing.integration import engine_config, write_config
from vllm_deepseek_v4flash.config import ARCHITECTURE
from vllm_deepseek_v4flash.integration import install, workarounds
from vllm_deepseek_v4flash.integration.workarounds import BREAKABLE_GRAPH_ENV, MLA_DISABLE_ENV

OURS = "vllm_deepseek_v4flash.integration.registered_model"


@pytest.mark.usefixtures("registered", "no_mla_switch")
def test_the_cpu_keeps_chunked_prefill_and_prefix_caching(tmp_path):
    from vllm.platforms import current_platform

    assert current_platform.is_cpu(), "this test is about vLLM's CPU build"
    config = engine_config(write_config(tmp_path / "model"), max_num_batched_tokens=256)
    assert config.scheduler_config.enable_chunked_prefill is True
    assert config.scheduler_config.max_num_batched_tokens == 256
    assert config.cache_config.enable_prefix_caching is True
    assert MLA_DISABLE_ENV not in os.environ
    cls, name = config.model_config.registry.resolve_model_cls(config.model_config.architectures, config.model_config)
    assert (cls.__module__, name) == (OURS, ARCHITECTURE)


@pytest.mark.usefixtures("registered", "no_mla_switch")
def test_a_use_mla_that_no_longer_follows_falls_back(log, monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: True)
    workarounds.keep_paged_cache_on_cpu(SimpleNamespace(use_mla=True))
    assert os.environ[MLA_DISABLE_ENV] == "1"
    assert [line for line in log if "no longer follows" in line]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("cpu", "asked", "eager", "says"),
    [
        (True, None, False, []),
        (False, None, True, ["CUDA graphs are off by default: capture has not been tested on a GPU in this release."]),
        (False, "NONE", False, []),
        (
            False,
            "FULL_AND_PIECEWISE",
            False,
            ["CUDA graphs (FULL_AND_PIECEWISE) are on: capture has not been tested on a GPU"],
        ),
    ],
)
def test_a_gpu_runs_eagerly_unless_graphs_are_asked_for(log, monkeypatch, cpu, asked, eager, says):
    from vllm.config import CUDAGraphMode

    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=SimpleNamespace(cudagraph_mode=asked and CUDAGraphMode[asked]),
    )
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: cpu)
    workarounds.turn_cuda_graphs_off_by_default(config)
    assert config.model_config.enforce_eager is eager
    assert [line[: len(said)] for line, said in zip(log, says, strict=True)] == says
    config.model_config.enforce_eager = True
    workarounds.turn_cuda_graphs_off_by_default(config)
    assert len(log) == len(says)


@pytest.mark.usefixtures("registered")
def test_the_hook_runs_before_vllm_fills_in_its_graph_mode(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        install, "turn_cuda_graphs_off_by_default", lambda config: seen.append(config.compilation_config.cudagraph_mode)
    )
    model = write_config(tmp_path / "model")
    engine_config(model)
    engine_config(model, compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"})
    assert [mode and mode.name for mode in seen] == [None, "FULL_AND_PIECEWISE"]


@pytest.mark.usefixtures("registered")
def test_a_pipeline_on_a_cpu_keeps_vllms_warm_up_run(tmp_path, monkeypatch):
    monkeypatch.setenv(BREAKABLE_GRAPH_ENV, "1")
    model = write_config(tmp_path / "model", num_hidden_layers=6, compress_ratios=[4, 128, 0, 0, 128, 4, 0])
    with pytest.raises(ValueError, match=r"--pipeline-parallel-size=2: .* on a CPU .*Start without --enforce-eager\. "):
        engine_config(model, pipeline_parallel_size=2, enforce_eager=True)
    config = engine_config(model, pipeline_parallel_size=2)
    assert config.compilation_config.mode != 0
