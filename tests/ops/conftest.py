"""Every test of an op runs on each of its implementations: PyTorch, Triton in its interpreter, Triton on a GPU.

The interpreter must be chosen before Triton is imported, which `tests/conftest.py` does for the whole session.
"""

from pathlib import Path

import pytest
import torch

import vllm_deepseek_v4flash.ops as ops
from vllm_deepseek_v4flash.ops import dispatch

TWINS = {path.stem for path in (Path(ops.__file__).parent / "triton").glob("*.py")}


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".test_")[2]
        twins = ["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)] if op in TWINS else []
        metafunc.parametrize("implementation", ["reference", *twins], indirect=True)


@pytest.fixture
def implementation(request, monkeypatch):
    """Which implementation of the tested op runs: `reference`, `interpreted` or `cuda`."""
    monkeypatch.setenv(dispatch.OPS_ENV, "reference" if request.param == "reference" else "triton")
    dispatch._resolve.cache_clear()
    yield request.param
    dispatch._resolve.cache_clear()


@pytest.fixture
def device(implementation):
    return torch.device("cuda" if implementation == "cuda" else "cpu")


@pytest.fixture
def rng():
    """A generator on the CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(0)
