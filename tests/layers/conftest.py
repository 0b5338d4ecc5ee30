"""Layers without an engine."""

import pytest


@pytest.fixture
def tensor_parallel(monkeypatch):
    """Layers built after `tensor_parallel(rank, size)` belong to that rank; to the only one without a call."""

    def become(rank, size):
        for module in ("layers.linear", "parameter"):
            name = f"vllm.model_executor.{module}.get_tensor_model_parallel"
            monkeypatch.setattr(f"{name}_rank", lambda: rank)
            monkeypatch.setattr(f"{name}_world_size", lambda: size)
        ours = "vllm_deepseek_v4flash.layers.projections.get_tensor_model_parallel_world_size"
        monkeypatch.setattr(ours, lambda: size)

    become(0, 1)
    return become
