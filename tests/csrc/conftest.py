"""The sources of csrc/, compiled for this CPU against csrc/emulator and put in place of the GPU's library."""

import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_deepseek_v4flash.ops.cuda import library as kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("csrc") / "kernels.so"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-dangling-pointer"]
    options = ["-x", "c++", "-std=c++17", "-O2", "-shared", "-fPIC", *warnings]
    subprocess.run([compiler, *options, "-o", target, ROOT / "csrc" / "experts.cu"], check=True)
    return kernels.load(target)
