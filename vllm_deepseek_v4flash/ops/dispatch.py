"""The one place where an op's implementation is chosen.

An op asks for the implementation of its own name on a device; the backends of that device are tried in order and the
first that has a file of that name wins, `reference` being the last of every list. `VLLM_DEEPSEEK_V4FLASH_OPS` chooses
otherwise: `reference` for PyTorch everywhere; `cpu` for the CPU's kernels and `cuda` for those of `csrc/`, each of
which it refuses to go without; `triton` for Triton's kernels alone, on a CPU too, where its interpreter must run them
(`TRITON_INTERPRET=1`). `prepare` imports what will run, which compiles the CPU's kernels, and `describe` says it in one
line, for the log of every worker.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cuda.library import built

OPS_ENV = "VLLM_DEEPSEEK_V4FLASH_OPS"
CHOICES = ("auto", "reference", "cpu", "triton", "cuda")

# Packages below `ops/`, fastest first. A device that is not listed runs the reference.
BACKENDS: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton") if built() else ("triton",)}
if importlib.util.find_spec("numba") is not None:
    BACKENDS["cpu"] = ("cpu",)


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes `op` on tensors of `device`: `ops/<backend>/<op>.py`'s function of that name."""
    return _resolve(op, device.type)


def chosen() -> str:
    """What the environment asks for, one of CHOICES.

    Raises:
        ValueError: it asks for something else.
    """
    choice = os.environ.get(OPS_ENV, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{OPS_ENV}={choice!r} is not known; allowed: {', '.join(CHOICES)}")
    return choice


def backends(device_type: str) -> tuple[str, ...]:
    """The packages that are searched for a device's ops, in order.

    Raises:
        ValueError: the environment asks for something that is not there.
    """
    choice = chosen()
    if choice == "auto":
        return (*BACKENDS.get(device_type, ()), "reference")
    if choice == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{OPS_ENV}=triton needs TRITON_INTERPRET=1 on a CPU, set before Python starts: Triton compiles for GPUs "
            f"only. Leave {OPS_ENV} unset for PyTorch's ops."
        )
    if choice == "cpu" and "cpu" not in BACKENDS.get(device_type, ()):
        raise ValueError(
            f"{OPS_ENV}=cpu needs a CPU and the package numba, which vLLM installs; this is {device_type}"
            f"{'' if device_type != 'cpu' else ' without numba'}. Leave {OPS_ENV} unset for what there is."
        )
    if choice == "cuda":
        if "cuda" not in BACKENDS.get(device_type, ()):
            raise ValueError(
                f"{OPS_ENV}=cuda needs a GPU and the kernels of csrc/, which an installation with nvcc compiles; this "
                f"is {device_type}{'' if built() else ' without them'}. Leave {OPS_ENV} unset for what there is."
            )
        return ("cuda", "triton", "reference")
    return ("reference",) if choice == "reference" else (choice, "reference")


def prepare(device: torch.device) -> None:
    """Import every op's implementation for a device: on a CPU this compiles the kernels, or reads them from the disk.

    The first compilation takes seconds, and belongs to the start of a server rather than to its first request.
    """
    for op in _ops():
        implementation(op, device)


def describe(device: torch.device) -> str:
    """Which ops run where, for the log: `ops on cuda: triton (compress, ...); reference (...)`."""
    by_backend: dict[str, list[str]] = {}
    for op in _ops():
        by_backend.setdefault(_backend_of(op, device.type), []).append(op)
    listed = "; ".join(f"{backend} ({', '.join(names)})" for backend, names in by_backend.items())
    missing = "; csrc/ was not compiled for want of nvcc" if device.type == "cuda" and not built() else ""
    return f"ops on {device.type}: {listed}{missing}"


def _ops() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "reference").glob("*.py") if path.stem != "__init__")


@functools.cache
def _resolve(op: str, device_type: str) -> Callable[..., Any]:
    package = __name__.rpartition(".")[0]
    return getattr(importlib.import_module(f"{package}.{_backend_of(op, device_type)}.{op}"), op)


def _backend_of(op: str, device_type: str) -> str:
    package = importlib.import_module(__name__.rpartition(".")[0])
    for backend in backends(device_type):
        if any((Path(root) / backend / f"{op}.py").is_file() for root in package.__path__):
            return backend
    raise LookupError(f"op {op!r} has no implementation: expected a function {op} in ops/reference/{op}.py")
