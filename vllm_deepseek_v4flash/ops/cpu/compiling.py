"""How kernels are compiled: when their module is imported, for one signature, and kept on disk.

An op's file is imported when the model is built (`dispatch.prepare`), so that no request waits for the compiler.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite.binding import ffi
from numba import types

CACHE_ENV = "NUMBA_CACHE_DIR"
CACHE_FIELDS = 8
Cache = tuple[int, ...]
"""A paged cache as passed to kernels; see `paged.cache`."""
PARTS = 8
Parts = tuple[int, ...]
"""Up to PARTS parts of a result as passed to kernels: columns, address, dtype; see `merged_linear`."""

# llvmlite's library object answers to every name, `__dict__` too, with a C function. vLLM looks into the `__dict__` of
# all modules' values when an engine starts on a CPU, and without this would fail once Numba has been imported.
if not isinstance(ffi.lib.__dict__, dict):
    ffi.lib._fntab["__dict__"] = {}

_TYPES = {
    "int": types.int64,
    "float": types.float32,
    "bool": types.boolean,
    "None": types.void,
    "Cache": types.UniTuple(types.int64, CACHE_FIELDS),
    "Parts": types.UniTuple(types.int64, 3 * PARTS),
}
# Sums may be reordered, which vectorises them, and products fused; NaN and infinities keep their meaning.
_SUMS = {"reassoc", "contract", "nsz"}

helper = numba.njit(error_model="numpy", fastmath={"contract"})
"""Decorator of a kernel's helper whose operations must stay in order."""
summing = numba.njit(error_model="numpy", fastmath=_SUMS)
"""Decorator of a kernel's helper whose sums may be taken in any order."""


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile `function` for the signature of its annotations, or load it from disk; it runs without the GIL."""
    notes = inspect.signature(function).parameters.values()
    signature = types.void(*(_TYPES[str(note.annotation)] for note in notes))
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
    directory = cache_directory()
    if directory is None:
        return numba.njit(signature, **options)(function)
    configured = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(directory)
    try:
        return numba.njit(signature, cache=True, **options)(function)
    finally:
        numba.config.CACHE_DIR = configured


@functools.cache
def cache_directory() -> Path | None:
    """Where compiled kernels are kept: below NUMBA_CACHE_DIR or the user's cache; None where neither can be written.

    Numba notices a change of a kernel's own file only, so the directory is named after the content of all of them.
    """
    content = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    name = f"vllm_deepseek_v4flash/{hashlib.sha256(content).hexdigest()[:16]}"
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(os.environ.get(CACHE_ENV) or user) / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError:
        return None
