"""Every test of an op runs on each of its implementations: PyTorch, Numba, Triton in its interpreter or on a GPU.

The interpreter must be chosen before Triton is imported, which `tests/conftest.py` does for the whole session.
"""

import os
from pathlib import Path

import pytest
import torch

import vllm_deepseek_v4flash.ops as ops
from vllm_deepseek_v4flash.ops import dispatch


def files(backend):
    return {path.stem for path in (Path(ops.__file__).parent / backend).glob("*.py")} - {"__init__"}


def need_interpreter():
    """Skip on a machine with a GPU, for which Triton compiles: there the tests marked `gpu` take its place."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: pytest -m gpu runs them, TRITON_INTERPRET=1 interprets them")


TWINS = files("triton")
ON_CPU = files("cpu") & files("reference")


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".test_")[2]
        twins = ["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)] if op in TWINS else []
        compiled = ["cpu"] if op in ON_CPU else []
        metafunc.parametrize("implementation", ["reference", *compiled, *twins], indirect=True)


@pytest.fixture
def implementation(request, monkeypatch):
    """Which implementation of the tested op runs: `reference`, `cpu`, `interpreted` or `cuda`."""
    if request.param == "interpreted":
        need_interpreter()
    choice = request.param if request.param in ("reference", "cpu") else "triton"
    monkeypatch.setenv(dispatch.OPS_ENV, choice)
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
