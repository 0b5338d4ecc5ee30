"""Memory by address: single values and rows of them, fp32 from any float dtype and back.

Kernels work on addresses and not on arrays, because Numba compiles a load in a hundredth of the time of an array's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compiling import helper

FP32, BF16, FP16 = range(3)
CODES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
_HALF = np.float32(0.5)
_FP16_BIAS = np.float32(2.0**-14)


def code(tensor: torch.Tensor) -> int:
    """The number that stands for the dtype of `tensor` in kernels."""
    return CODES[tensor.dtype]


def packed(*tensors: Any) -> tuple[Any, ...]:
    """The tensors made contiguous, None unchanged; the caller must hold them while a kernel has their addresses."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            return tuple(t if t is None else t.contiguous() for t in tensors)
    return tensors


def _element(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def _reader(kind: Any, result: Any, *, signed: bool = True, noalias: bool = False) -> Any:
    def read(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index = arguments
            value = builder.load(_element(builder, address, index, kind))
            if noalias:
                value.set_metadata("alias.scope", _scope(builder.module))
            if isinstance(result, types.Float):
                return value
            wide = context.get_value_type(result)
            return value if value.type == wide else (builder.sext if signed else builder.zext)(value, wide)

        return result(types.int64, types.int64), generate

    return intrinsic(read)


def _writer(kind: Any, value_type: Any, *, noalias: bool = False) -> Any:
    def write(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index, value = arguments
            if value.type != kind:
                value = builder.trunc(value, kind)
            stored = builder.store(value, _element(builder, address, index, kind))
            if noalias:
                stored.set_metadata("noalias", _scope(builder.module))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value_type), generate

    return intrinsic(write)


def _scope(module: Any) -> Any:
    """LLVM's alias scope of what `get_noalias` reads and `put_noalias` promises not to overwrite."""
    domain = module.add_metadata(["deepseek_v4flash"])
    return module.add_metadata([module.add_metadata(["noalias reads", domain])])


get = _reader(ir.FloatType(), types.float32)
"""Element `index` (second argument) of the fp32 values at an address; the others likewise, integers as int64."""
get_i32 = _reader(ir.IntType(32), types.int64)
get_i64 = _reader(ir.IntType(64), types.int64)
get_u16 = _reader(ir.IntType(16), types.int64, signed=False)
get_u8 = _reader(ir.IntType(8), types.int64, signed=False)
put = _writer(ir.FloatType(), types.float32)
put_i32 = _writer(ir.IntType(32), types.int64)
put_i64 = _writer(ir.IntType(64), types.int64)
put_u16 = _writer(ir.IntType(16), types.int64)
put_u8 = _writer(ir.IntType(8), types.int64)
get_noalias = _reader(ir.FloatType(), types.float32, noalias=True)
"""`get`, for values that no `put_noalias` of the same kernel overwrites: loops with both are vectorised."""
put_noalias = _writer(ir.FloatType(), types.float32, noalias=True)


@intrinsic
def _fetch_line(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        # To read, for the second cache, data.
        builder.call(function, [builder.inttoptr(arguments[0], byte), *(ir.Constant(flag, i) for i in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@helper
def fetch(address, size):
    """Prefetch `size` bytes; hardware prefetchers stop at the borders of 4 KiB pages."""
    for line in range(0, size, 64):
        _fetch_line(address + line)


@intrinsic
def number(context: Any, bits: Any) -> Any:
    """The fp32 number with these 32 bits (of an int64)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), generate


@intrinsic
def bits(context: Any, value: Any) -> Any:
    """The 32 bits of an fp32 number, as a non-negative int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.bitcast(arguments[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(types.float32), generate


@helper
def integer(address, wide, index):
    """Element `index` of an int64 tensor if `wide`, or else of an int32 one."""
    return get_i64(address, index) if wide else get_i32(address, index)


@helper
def from_bf16(half):
    return number(half << 16)


@helper
def to_bf16(value):
    whole = bits(value)
    return (whole + 0x7FFF + (whole >> 16 & 1)) >> 16 if value == value else 0x7FC0


@helper
def from_fp16(half):
    magnitude = (half & 0x7FFF) << 13
    exponent = magnitude & 0x0F800000
    if exponent == 0x0F800000:
        value = number(magnitude + (224 << 23))
    elif exponent == 0:
        # Subnormal: read it as a fraction above 2^-14, and take that away.
        value = number(magnitude + (113 << 23)) - _FP16_BIAS
    else:
        value = number(magnitude + (112 << 23))
    return -value if half & 0x8000 else value


@helper
def to_fp16(value):
    whole = bits(value)
    magnitude, sign = whole & 0x7FFFFFFF, whole >> 16 & 0x8000
    if magnitude > 0x7F800000:
        half = 0x7E00
    elif magnitude >= 0x47800000:
        half = 0x7C00
    elif magnitude < 0x38800000:
        # The sum with 0.5 rounds to multiples of 2^-24, the smallest subnormal.
        half = bits(number(magnitude) + _HALF) - 0x3F000000
    else:
        half = (magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13
    return half | sign


@helper
def load(address, dtype, count, out):
    """`count` values at `address` to fp32 at `out`."""
    if dtype == FP32:
        for i in range(count):
            put_noalias(out, i, get_noalias(address, i))
    elif dtype == BF16:
        for i in range(count):
            put(out, i, from_bf16(get_u16(address, i)))
    else:
        for i in range(count):
            put(out, i, from_fp16(get_u16(address, i)))


@helper
def store(address, dtype, count, values):
    """`count` fp32 `values` to `address`, rounded to nearest even."""
    if dtype == FP32:
        for i in range(count):
            put_noalias(address, i, get_noalias(values, i))
    elif dtype == BF16:
        for i in range(count):
            put_u16(address, i, to_bf16(get(values, i)))
    else:
        for i in range(count):
            put_u16(address, i, to_fp16(get(values, i)))


@helper
def fill(address, count, value):
    for i in range(count):
        put(address, i, value)


@helper
def size_of(dtype):
    return 4 if dtype == FP32 else 2


@helper
def rounded(value, dtype):
    """An fp32 value rounded to `dtype`."""
    if dtype == FP32:
        return value
    return from_bf16(to_bf16(value)) if dtype == BF16 else from_fp16(to_fp16(value))
