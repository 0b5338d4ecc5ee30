"""tests/ops/compiled in a pytest of its own, in which Triton compiles its kernels instead of interpreting them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "ops" / "compiled"
FILES = sorted(path.name for path in TESTS.glob("test_*.py"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_compiled_kernels(file: str, selection: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations", "20", "-m", selection]
    done = subprocess.run(
        [*command, str(TESTS / file)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=7200
    )
    if done.returncode == 5 and re.search(r"[1-9]\d* deselected", done.stdout):
        pytest.skip(f"{file} has no test that is {selection}")
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert re.search(r"[1-9]\d* (passed|skipped)", done.stdout.strip().splitlines()[-1])
