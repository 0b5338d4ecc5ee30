"""Every test of an op runs on each of its implementations: PyTorch, Numba, Triton in its interpreter or on a GPU.

The interpreter must be chosen before Triton is imported, which `tests/conftest.py` does for the whole session.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_deepseek_v4flash.ops as ops
from testing.ops.interpreted import need_interpreter
from vllm_deepseek_v4flash.ops import dispatch


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".test_")[2]
        found = {path.parent.name for path in Path(ops.__file__).parent.glob(f"*/{op}.py")}
        cases: list[Any] = ["reference", *(backend for backend in ("cpu", "torch") if backend in found)]
        if "triton" in found:
            cases.append("interpreted")
        if {"triton", "torch"} & found:
            cases.append(pytest.param("cuda", marks=pytest.mark.gpu))
        metafunc.parametrize("implementation", cases, indirect=True)


@pytest.fixture
def implementation(request):
    """Which implementation of the tested op runs: `reference`, `cpu`, `torch`, `interpreted` or `cuda`."""
    if request.param == "interpreted":
        need_interpreter()
    with dispatch.use({"interpreted": "triton", "cuda": "triton"}.get(request.param, request.param)):
        yield request.param


@pytest.fixture
def device(implementation):
    return torch.device("cuda" if implementation == "cuda" else "cpu")


@pytest.fixture
def rng():
    """A generator on the CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(0)
