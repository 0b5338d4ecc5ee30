"""Tests marked `both_runners` also pass on vLLM's V2 model runner, in their own pytest process.

vLLM chooses its runner when it is imported, so the two cannot share a process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "testing" / "v2_on_cpu"
TESTS = ROOT / "tests" / "v2_on_cpu"
PLAIN = ("-p", "no:cacheprovider", "--durations", "20")


def run_on_v2(*arguments: str, timeout: float) -> str:
    """Run this Python with `arguments` and the V2 runner; returns its output, AssertionError if it failed."""
    environment = dict(os.environ, PYTHONPATH=f"{HARNESS}{os.pathsep}{ROOT}")
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_vllm_chooses_the_v2_runner() -> None:
    code = (
        "from vllm.engine.arg_utils import EngineArgs; "
        "config = EngineArgs(model='examples/toy', dtype='float32').create_engine_config(); "
        "print('V2', config.use_v2_model_runner)"
    )
    assert "V2 True" in run_on_v2("-c", code, timeout=1200)


@pytest.mark.parametrize(
    ("file", "selection"),
    [
        pytest.param("test_triton_ops.py", "not slow", id="kernels"),
        pytest.param("test_triton_ops.py", "slow", id="kernels-slow", marks=pytest.mark.slow),
        pytest.param("test_cuda_graphs.py", "not slow", id="graphs"),
    ],
)
def test_the_gpu_path_inside_vllm(file: str, selection: str) -> None:
    printed = run_on_v2("-m", "pytest", "-q", *PLAIN, "-m", selection, str(TESTS / file), timeout=7200)
    assert re.search(r"[1-9]\d* passed", printed.strip().splitlines()[-1]), printed


@pytest.mark.parametrize(
    ("selection", "paths"),
    [
        pytest.param("both_runners and not slow and not gpu", ("tests/scheduler",), id="scheduler"),
        pytest.param("both_runners and not slow and not gpu", ("tests", "--ignore=tests/scheduler"), id="others"),
        pytest.param("both_runners and slow and not gpu", ("tests",), id="slow", marks=pytest.mark.slow),
    ],
)
def test_marked_tests_pass_on_v2(selection: str, paths: tuple[str, ...]) -> None:
    printed = run_on_v2("-m", "pytest", "-q", *PLAIN, "-m", selection, *paths, timeout=7200)
    summary = printed.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None, summary
    assert int(passed[1]) > 0, summary
