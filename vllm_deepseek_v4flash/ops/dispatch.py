"""The one place where an op's implementation is chosen.

An op asks for the implementation of its own name on a device; the backends listed for that device are tried in order
and the first that has a file of that name wins. The choice is logged once per op, so nobody has to guess what ran.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from vllm_deepseek_v4flash import logger_name

logger = logging.getLogger(logger_name(__name__))

# Packages below `ops/`, fastest first. A device that is not listed runs the reference.
BACKENDS: dict[str, tuple[str, ...]] = {}


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes `op` on tensors of `device`: `ops/<backend>/<op>.py`'s function of that name."""
    return _resolve(op, device.type)


@functools.cache
def _resolve(op: str, device_type: str) -> Callable[..., Any]:
    package = __name__.rpartition(".")[0]
    for backend in (*BACKENDS.get(device_type, ()), "reference"):
        module = f"{package}.{backend}.{op}"
        if importlib.util.find_spec(module) is not None:
            logger.debug("%s on %s: %s", op, device_type, backend)
            return getattr(importlib.import_module(module), op)
    raise LookupError(f"op {op!r} has no implementation: expected a function {op} in ops/reference/{op}.py")
