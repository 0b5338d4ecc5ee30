"""Kernels as compiled for a GPU, executed on a CPU (testing/ptxrun) against oracles in fp64.

They need a process in which Triton compiles; tests/test_compiled_kernels.py starts one.
"""

import functools
import os

import pytest

from testing.ptxrun import cuda_kernels, triton_kernels

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*.py"]


@pytest.fixture
def execute(request):
    """Runs Triton's kernels as compiled for the architecture that is the parameter."""
    return functools.partial(triton_kernels.executed, request.param)


@pytest.fixture
def nvcc():
    if cuda_kernels.nvcc() is None:
        pytest.skip("needs nvcc")
