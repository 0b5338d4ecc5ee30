"""Compiles csrc/ where nvcc is found; without, the package is plain Python and runs Triton's kernels instead.

Everything else about the package is in pyproject.toml. `DEEPSEEK_V4FLASH_NVCC` names the compiler to use, or is empty
to do without.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_LIBRARY = "vllm_deepseek_v4flash.ops.cuda.kernels"
NVCC = os.environ.get("DEEPSEEK_V4FLASH_NVCC", shutil.which("nvcc") or "")
ARCHS = (80, 86, 89, 90, 100, 120)  # an older nvcc does without those it does not know
SOURCES = ["csrc/experts.cu"]
HEADERS = ["csrc/gpu.cuh", "csrc/plan.cuh", "csrc/product.cuh", "csrc/weights.cuh"]


class BuildKernels(build_ext):
    """nvcc instead of a C compiler, and a library that Python loads through ctypes instead of importing it."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        known = subprocess.run([NVCC, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS if f"compute_{a}" in known]
        options = ["-std=c++17", "-O3", "--shared", "-Xcompiler=-fPIC", "--threads=0", *archs]
        subprocess.run([NVCC, *options, "-o", str(target), *extension.sources], check=True)


setup(
    ext_modules=[Extension(CUDA_LIBRARY, SOURCES, depends=HEADERS)] if NVCC else [],
    cmdclass={"build_ext": BuildKernels},
)
