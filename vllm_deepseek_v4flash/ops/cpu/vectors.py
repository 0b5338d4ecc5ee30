"""Vectors of fp32 lanes, for products whose sums must be taken in one order, independent of the shape of a tile.

LLVM vectorises a plain loop in an order of its own choice, which differs between loops: a token's result would depend
on how many tokens are computed with it.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_FUSED = ("contract",)
_INDEX = ir.IntType(32)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__("Vector")


VECTOR = _Vector()


@register_default(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _pointer(builder: Any, address: Any, index: Any, element: Any) -> Any:
    """Pointer to LANES elements, starting at element `index`."""
    first = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    return builder.bitcast(first, ir.VectorType(element, LANES).as_pointer())


def _widened(builder: Any, halves: Any) -> Any:
    """bf16 lanes as fp32."""
    whole = builder.zext(halves, ir.VectorType(ir.IntType(32), LANES))
    return builder.bitcast(builder.shl(whole, ir.Constant(whole.type, [16] * LANES)), _FLOATS)


def _loader(element: Any, finish: Any) -> Any:
    def load(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index = arguments
            return finish(builder, builder.load(_pointer(builder, address, index, element), align=1))

        return VECTOR(types.int64, types.int64), generate

    return intrinsic(load)


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INDEX, 0))
    zeros = ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


lanes = _loader(ir.FloatType(), lambda _, x: x)
"""The LANES fp32 values starting at element `index` (second argument)."""
lanes_bf16 = _loader(ir.IntType(16), _widened)
lanes_fp16 = _loader(ir.HalfType(), lambda builder, x: builder.fpext(x, _FLOATS))


@intrinsic
def no_lanes(typing_context: Any) -> Any:
    """Zeros."""
    return VECTOR(), lambda context, builder, signature, arguments: ir.Constant(_FLOATS, [0.0] * LANES)


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """One value in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, arguments[0], _FLOATS)

    return VECTOR(types.float32), generate


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the CPU can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)

    return VECTOR(VECTOR, VECTOR, VECTOR), generate


@intrinsic
def put_lanes(typing_context: Any, address: Any, index: Any, vector: Any) -> Any:
    """Store all lanes, starting at element `index`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, vector = arguments
        builder.store(vector, _pointer(builder, address, index, ir.FloatType()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, VECTOR), generate


def _sums(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sums of the lanes of four vectors, as a vector of four."""

    def together(x: Any, y: Any, run: int) -> Any:
        """Sums over runs twice as long, alternately of x and y."""
        left = [2 * i * run + j + k * LANES for i in range(LANES // 2 // run) for k in (0, 1) for j in range(run)]
        return _added(builder, x, y, left, [i + run for i in left])

    whole, size = together(together(a, b, 1), together(c, d, 1), 2), LANES
    while size > 4:
        size //= 2
        whole = _added(builder, whole, whole, list(range(size)), list(range(size, 2 * size)))
    return whole


def _added(builder: Any, x: Any, y: Any, left: list[int], right: list[int]) -> Any:
    """The lanes `left` of x and y, those of y counted after those of x, plus their lanes `right`."""
    kind = ir.VectorType(_INDEX, len(left))
    return builder.fadd(*(builder.shuffle_vector(x, y, ir.Constant(kind, part)) for part in (left, right)))


@intrinsic
def put_sums(typing_context: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Store the sums of the lanes of four vectors, one after the other."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, *vectors = arguments
        whole = _sums(builder, *vectors)
        builder.store(whole, builder.inttoptr(address, whole.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR, VECTOR, VECTOR, VECTOR), generate


@intrinsic
def lane_sum(typing_context: Any, vector: Any) -> Any:
    """The sum of the lanes, in the order of `put_sums`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(_sums(builder, *arguments * 4), ir.Constant(_INDEX, 0))

    return types.float32(VECTOR), generate
