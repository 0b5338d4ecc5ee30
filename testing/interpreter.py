"""Makes Triton's interpreter compute bf16 and e4m3 as a GPU does.

As shipped (3.6 to 3.9) it truncates where a GPU rounds to nearest, and multiplies bf16 matrices as the integers that it
stores them as. Here torch converts, and matrices are widened to fp32 first, which is exact. Before 3.9 it also cannot
invert an unsigned integer (`~`), for which it asks NumPy for an unsigned -1.

It also spends most of its time on work without an effect, which is skipped here: it computes whether integers overflow
and discards the result; at every call of a function by a kernel it replaces the operations of Triton's language by its
own, although they have been its own since the kernel began; and it makes a table of dtypes whenever it looks one up.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16)}

_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot
_patch_lang = interpreter._patch_lang
_get_np_dtype = interpreter._get_np_dtype


def correct() -> None:
    """Correct the interpreter of this process; a second call changes nothing."""
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.get_all_ones_value = get_all_ones_value
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = get_np_dtype
    options = interpreter.interpreter_builder.options
    if not options.debug:  # which alone reports an overflow
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def convert_float(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """The bits of `data` in dtype `target`, rounded to nearest even. data: values of dtype `source` as stored."""
    known = (tl.float32, tl.float16, *_TORCH)
    if source not in known or target not in known:
        return _convert_float(data, source, target, rounding_mode)
    values = torch.from_numpy(np.ascontiguousarray(data))
    if source in _TORCH:
        values = values.view(_BITS[data.dtype.itemsize][0]).view(_TORCH[source])
    values = values.float()
    if target not in _TORCH:
        return (
            values.numpy()
            .astype(np.float16 if target == tl.float16 else np.float32)
            .view(np.uint16 if target == tl.float16 else np.uint32)
        )
    rounded = values.to(_TORCH[target])
    signed, unsigned = _BITS[rounded.dtype.itemsize]
    return rounded.view(signed).numpy().view(unsigned)


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    a, b = (_widened(x) for x in (a, b))
    return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def get_all_ones_value(self: Any, type: Any) -> Any:
    """Every bit set, in an integer or a boolean dtype."""
    zero = np.zeros(1, dtype=_get_np_dtype(type))
    return interpreter.TensorHandle(~zero, type.scalar)


def _widened(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


_np_dtypes: dict[str, Any] = {}


def get_np_dtype(dtype: Any) -> Any:
    """The NumPy dtype in which the interpreter stores a Triton dtype, a pointer or a block of either."""
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    found = _np_dtypes.get(element.name)
    if found is None:
        found = _np_dtypes[element.name] = _get_np_dtype(element)
    return found


class _NoPatch:
    """Stands for a patch that was not needed."""

    def restore(self) -> None:
        pass


def patch_lang(fn: Callable[..., Any]) -> Any:
    """Patch the language for `fn`, unless it is patched; of a module either all is patched or nothing."""
    if any(tl.core.is_builtin(module.load) for module in _language(fn)):
        return _patch_lang(fn)
    return _NoPatch()


@functools.cache
def _language(fn: Callable[..., Any]) -> list[ModuleType]:
    """The modules of Triton's language in the globals of `fn`, which the interpreter patches."""
    return [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
