"""What an installation does with csrc/: everything where there is an nvcc, nothing where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_deepseek_v4flash.ops.cuda.library import LIBRARY

ROOT = Path(__file__).parents[2]
# Knows no GPU newer than sm_90, and writes down what it is asked to compile.
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n'; exit; fi
echo "$@" > "$(dirname "$0")/asked"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def build(tmp_path):
    """Builds the package as an installation does, with a compiler of this name; returns what lies in its place."""

    def run(nvcc):
        # Nothing is written next to the sources, which other tests run from.
        build, objects = str(tmp_path / "build"), str(tmp_path / "objects")
        commands = ["egg_info", "-e", str(tmp_path), "build", "-b", build, "-t", objects]
        environment = {**os.environ, "DEEPSEEK_V4FLASH_NVCC": str(nvcc)}
        subprocess.run(
            [sys.executable, "setup.py", "-q", *commands], cwd=ROOT, env=environment, check=True, capture_output=True
        )
        return {path.name for path in tmp_path.glob(f"build/*/vllm_deepseek_v4flash/ops/cuda/{LIBRARY.name}")}

    return run


def test_without_nvcc_there_are_no_kernels_and_no_error(build):
    assert build("") == set()


def test_with_nvcc_there_are_kernels_for_every_gpu_that_it_knows(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    assert build(nvcc) == {LIBRARY.name}
    asked = (tmp_path / "asked").read_text()
    assert "csrc/experts.cu" in asked
    for arch in (80, 86, 89, 90):
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in asked
    for arch in (75, 100, 120):
        assert f"sm_{arch}" not in asked
