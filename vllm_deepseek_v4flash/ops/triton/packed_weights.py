"""Products of activations with a stored weight, decoded tile by tile (`ops/packed_weight.py`).

A tile of a 4-bit weight is read in words of 2, 4 or 8 columns. The first columns of all words form a tile, the second
ones another, and each such tile is multiplied by the same columns of the activations: every code is decoded in place,
with a shift and a mask of its word.

A tile of the weight is the left operand of its product. Its rows are then on the long side of the matrix instructions
and the tokens, of which there are few, on the short one; and on SM90 it goes from the registers that decoded it into
the matrix units without a detour through shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..packed_weight import FP8_BLOCK, Scheme
from .codecs import decode_e4m3
from .launch import Pointer

_SMALLEST_K = 32  # columns of a tile: what one instruction multiplies of the even and of the odd ones
_PLAIN_K = 64  # columns of a tile that is not packed, at most: shared memory holds several tiles
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Weight(NamedTuple):
    """The tensors of a stored weight; what its format lacks is None."""

    data: Pointer
    scales: Pointer | None
    zeros: Pointer | None
    perm: Pointer | None


class Form(NamedTuple):
    """How a kernel reads a weight, for which it is compiled."""

    format: str
    """`int4`, `fp4`, `fp8` or `plain`."""
    rows: int
    columns: int
    group: int
    """Columns that share a scale."""
    block_k: int
    """Columns of a tile."""
    native: bool
    """Whether the device converts e4m3."""


class Tile(NamedTuple):
    """What one program computes, for which a kernel is compiled."""

    block_r: int
    """Rows of the weight."""
    block_t: int
    """Tokens."""
    stages: int
    """Tiles of the weight that are on the way at the same time."""


class WeightRows(NamedTuple):
    """Rows of a stack of matrices, inside a kernel."""

    matrix: Any
    """[R] int64, the number of each row's matrix."""
    row: Any
    """[R] int32, counted within the matrix."""
    valid: Any
    """[R]; other rows are not read, and give zeros."""


class InputRows(NamedTuple):
    """Rows of the activations, inside a kernel."""

    row: Any
    """[T] int64"""
    valid: Any
    """[T]; other rows are not read, and give zeros."""


@dataclass(frozen=True)
class StoredWeight:
    """Matrices [N, K] of one size, contiguous one after another, and how to read them."""

    tensors: Weight
    format: str
    """`int4`, `fp4`, `fp8` or `plain`."""
    rows: int
    columns: int
    group: int
    """Columns that share a scale."""

    @staticmethod
    def of(weight: Mapping[str, torch.Tensor], scheme: Scheme) -> StoredWeight:
        """Canonical tensors, stacked or not.

        Raises:
            ValueError: a tensor is not contiguous, or no tile holds whole groups.
        """
        for name, tensor in weight.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}: copy it once, at load")
        data = weight["weight" if scheme.kind == "plain" else "qweight"]
        rows, columns = data.shape[-2], data.shape[-1] * (2 if scheme.kind in ("int4", "fp4") else 1)
        group = columns if scheme.kind == "plain" else scheme.group_size
        if group not in (columns, 2, 4, 8, 16) and group % _SMALLEST_K:
            raise ValueError(
                f"Triton kernels need groups of a multiple of {_SMALLEST_K} columns or of 2, 4, 8 or 16, got {group}: "
                f"set VLLM_DEEPSEEK_V4FLASH_OPS=reference"
            )
        if scheme.kind == "fp8":
            data = data.view(torch.uint8)
        tensors = Weight(
            data, weight.get("scales"), weight.get("zeros") if scheme.zero_points else None,
            weight["perm"] if scheme.act_order else None,
        )  # fmt: skip
        return StoredWeight(tensors, scheme.kind, rows, columns, group)

    def fitted(self, block_k: int, word: int, native: bool) -> tuple[Weight, Form]:
        """The weight as a kernel's arguments.

        Tiles have up to `block_k` columns, a power of two that is at least 32, and do not cut a group; 4-bit data come
        in words of up to `word` bytes, 1, 2 or 4.
        """
        whole = self.group == self.columns
        size = min(block_k, {"plain": _PLAIN_K, "fp8": FP8_BLOCK}.get(self.format, block_k))
        while size > _SMALLEST_K and (
            size // 2 >= self.columns
            or (self.format != "fp8" and not whole and self.group % size and size % self.group)
        ):
            size //= 2
        data = self.tensors.data
        if self.format in ("int4", "fp4"):
            while word > 1 and (size // (2 * word) < 16 or self.columns % (2 * word) or self.group < 2 * word):
                word //= 2
            data = data.view(_WORDS[word])
        return self.tensors._replace(data=data), Form(self.format, self.rows, self.columns, self.group, size, native)


def tile_for(dtype: torch.dtype, tokens: float) -> tuple[int, int, Tile, dict[str, Any]]:
    """For so many tokens of a weight: columns and word size for `StoredWeight.fitted`, tile and launch options."""
    if dtype is torch.float32:  # which no matrix unit multiplies
        return 32, 1, Tile(block_r=64, block_t=16, stages=2), {"num_warps": 4}
    if tokens <= 16:
        return 128, 4, Tile(block_r=64, block_t=16, stages=5), {"num_warps": 4}
    if tokens <= 48:
        return 128, 4, Tile(block_r=128, block_t=32, stages=3), {"num_warps": 4}
    # Few columns at a time, or the registers do not suffice.
    return 32, 1, Tile(block_r=128, block_t=64 if tokens <= 96 else 128, stages=4), {"num_warps": 8}


def pairable(x: torch.Tensor) -> torch.Tensor:
    """`x` or a copy of it, contiguous and such that two 16-bit values make an aligned word."""
    x = x.contiguous()
    return x.clone() if x.storage_offset() % 2 else x


@triton.jit
def product(
    x, inputs: InputRows, weight: Weight, perm, rows: WeightRows, first, last, acc,
    FORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc [R, T] + weight[matrix, row] @ x[inputs.row].T, summed over the tiles of columns number first..last-1.

    `perm` is that of all rows, or None.
    """
    FORMAT: tl.constexpr = FORM.format
    COLUMNS: tl.constexpr = FORM.columns
    BLOCK_K: tl.constexpr = FORM.block_k
    NATIVE: tl.constexpr = FORM.native
    stored = rows.matrix * FORM.rows + rows.row
    PAIRED: tl.constexpr = FORMAT == "int4" or FORMAT == "fp4"
    PAIRS: tl.constexpr = weight.data.dtype.element_ty.primitive_bitwidth // 8  # of a stored element, if it has any
    PER: tl.constexpr = 2 * PAIRS if PAIRED else 1  # columns of a stored element
    # A 16-bit scale times a number of 12 bits is exact in fp32. (Triton 3.6 makes a tensor of what a function returns.)
    FUSED: tl.constexpr = False if weight.scales is None else weight.scales.dtype.element_ty.primitive_bitwidth == 16
    WIDTH: tl.constexpr = COLUMNS // PER
    STEP: tl.constexpr = BLOCK_K // PER
    column = tl.arange(0, STEP)
    base = weight.data + stored[:, None] * WIDTH + column[None, :]
    scale_row = stored
    if FORMAT == "fp8":
        scale_row = rows.matrix * ((FORM.rows + 127) // 128) + rows.row // 128
    scale, zero = load_scales(weight, scale_row, rows.valid, first * BLOCK_K, FORM)
    for k in tl.range(first * STEP, last * STEP, STEP, num_stages=STAGES):
        inside = k + column < WIDTH
        code = tl.load(base + k, mask=rows.valid[:, None] & inside[None, :], other=0)  # [R, STEP]
        # A tile's scales are too narrow to be copied asynchronously: they are loaded one tile ahead.
        ahead, zero_ahead = load_scales(weight, scale_row, rows.valid, (k + STEP) * PER, FORM)
        some = inside[:, None] & inputs.valid[None, :]
        if PAIRED:
            low_offset, high_offset = offsets(scale, zero, FORMAT, FUSED)
            wide, low_offset, high_offset = spread(scale, STEP), spread(low_offset, STEP), spread(high_offset, STEP)
            for i in tl.static_range(PAIRS):
                # acc = acc + dequantised[:, pair] @ x[:, pair].T, even columns and then odd ones
                low, high = decode_pair(code, i, wide, low_offset, high_offset, FORMAT, FUSED, x.dtype.element_ty)
                pair = (k + column) * PAIRS + i
                even, odd = load_pair(x, inputs.row[None, :], pair[:, None], some, perm, COLUMNS)
                acc = tl.dot(low, even, acc, input_precision="ieee")
                acc = tl.dot(high, odd, acc, input_precision="ieee")
        else:
            # acc = acc + dequantised[:, columns] @ x[:, columns].T
            tile = decode_one(code, scale, FORMAT, NATIVE, x.dtype.element_ty)
            at = x + inputs.row[None, :] * COLUMNS + (k + column)[:, None]
            acc = tl.dot(tile, tl.load(at, mask=some, other=0.0), acc, input_precision="ieee")  # [STEP, T]
        scale, zero = ahead, zero_ahead
    return acc


@triton.jit
def load_scales(weight: Weight, scale_row, row_valid, column, FORM: tl.constexpr):
    """Scales and zeros [R, groups] fp32 of the tile that begins at `column`; beyond the last one, anything finite."""
    GROUP: tl.constexpr = FORM.group
    GROUPS: tl.constexpr = (FORM.columns + GROUP - 1) // GROUP
    # Two columns at least: one would be spread in a layout from which Triton moves the codes through shared memory.
    FEWEST: tl.constexpr = 1 if FORM.format == "fp8" else 2
    TILE: tl.constexpr = FORM.block_k // GROUP if FORM.block_k > FEWEST * GROUP and FORM.columns > GROUP else FEWEST
    group = (column + tl.arange(0, TILE) * (FORM.block_k // TILE)) // GROUP
    at = scale_row[:, None] * GROUPS + group[None, :]
    mask = row_valid[:, None] & (group < GROUPS)[None, :]
    if FORM.format == "plain":
        scale = tl.full((1, 1), 1.0, tl.float32)
    elif FORM.format == "fp4":
        scale = decode_ue8m0(tl.load(weight.scales + at, mask=mask, other=0))  # [R, TILE]
    else:
        scale = tl.load(weight.scales + at, mask=mask, other=0.0).to(tl.float32)  # [R, TILE]
    if weight.zeros is not None:
        zero = tl.load(weight.zeros + at, mask=mask, other=0).to(tl.float32)  # [R, TILE]
    else:
        zero = tl.full((1, 1), 8.0, tl.float32)
    return scale, zero


@triton.jit
def offsets(scale, zero, FORMAT: tl.constexpr, FUSED: tl.constexpr):
    """What `decode_pair` subtracts from, or where FUSED adds to, an even and an odd column."""
    low, high = zero + 2048.0, zero + 128.0
    if FORMAT == "int4" and FUSED:
        low, high = -low * scale, -high * scale
    return low, high


@triton.jit
def spread(values, WIDTH: tl.constexpr):
    """[R, groups] to [R, WIDTH], or what broadcasts to it."""
    if values.shape[1] > 1:
        EACH: tl.constexpr = WIDTH // values.shape[1]
        wide = tl.broadcast_to(values[:, :, None], (values.shape[0], values.shape[1], EACH))
        values = wide.reshape(values.shape[0], WIDTH)
    return values


@triton.jit
def decode_ue8m0(code):
    """uint8 codes e to 2^(e - 127) in fp32, 255 to NaN."""
    bits = code.to(tl.uint32)
    # 2^-127 is half the smallest normal number; the same bit makes a NaN of the infinity that 255 would give.
    return (bits << 23 | tl.where((bits == 0) | (bits == 255), 0x400000, 0).to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def decode_pair(
    word, BYTE: tl.constexpr, scale, low_offset, high_offset,
    FORMAT: tl.constexpr, FUSED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The even and the odd columns of the bytes number BYTE of a tile of words, rounded to DTYPE once."""
    bits = word.to(tl.uint32)
    # low, high = (bits & 15 - zero) * scale, (bits >> 4 - zero) * scale
    if FORMAT == "fp4":
        low, high = decode_e2m1_at(bits, 8 * BYTE) * scale, decode_e2m1_at(bits, 8 * BYTE + 4) * scale
    else:
        # In bits 12 to 15 of the fp32 number 2048 a code needs no conversion, and in bits 16 to 19 of 128.
        bits = moved(bits, 8 * BYTE, 12)
        low = (bits & 0xF000 | 0x45000000).to(tl.float32, bitcast=True)
        high = (bits & 0xF0000 | 0x43000000).to(tl.float32, bitcast=True)
        if FUSED:
            low, high = tl.fma(low, scale, low_offset), tl.fma(high, scale, high_offset)
        else:
            low, high = (low - low_offset) * scale, (high - high_offset) * scale
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def decode_e2m1_at(bits, START: tl.constexpr):
    """The codes that begin at bit START, to fp32; see `codecs.decode_e2m1`."""
    tiny = (moved(bits, START + 3, 31) & 0x80000000 | moved(bits, START, 22) & 0x1C00000).to(tl.float32, bitcast=True)
    return tiny * 8.507059173023462e37  # 2^126


@triton.jit
def moved(bits, FROM: tl.constexpr, TO: tl.constexpr):
    """uint32 shifted so that bit FROM becomes bit TO."""
    return bits << (TO - FROM) if TO >= FROM else bits >> (FROM - TO)


@triton.jit
def decode_one(code, scale, FORMAT: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """A tile with an element per column, rounded to DTYPE once."""
    if FORMAT == "fp8":
        weight = (decode_e4m3(code, NATIVE) * scale).to(DTYPE)
    else:
        weight = code.to(DTYPE)
    return weight


@triton.jit
def load_pair(x, row, pair, mask, perm, COLUMNS: tl.constexpr):
    """Columns 2 * pair and 2 * pair + 1 of rows of x, or the columns that `perm` says; zero where masked."""
    at = x + row * COLUMNS
    if perm is not None:
        some = pair < COLUMNS // 2
        even = tl.load(at + tl.load(perm + 2 * pair, mask=some, other=0), mask=mask, other=0.0)  # [STEP, T]
        odd = tl.load(at + tl.load(perm + 2 * pair + 1, mask=some, other=0), mask=mask, other=0.0)  # [STEP, T]
    elif x.dtype.element_ty.primitive_bitwidth == 16:
        words = x.to(tl.pointer_type(tl.uint32))
        word = tl.load(words + row * (COLUMNS // 2) + pair, mask=mask, other=0)  # [STEP, T]
        even = (word & 0xFFFF).to(tl.uint16).to(x.dtype.element_ty, bitcast=True)
        odd = (word >> 16).to(tl.uint16).to(x.dtype.element_ty, bitcast=True)
    else:
        even = tl.load(at + 2 * pair, mask=mask, other=0.0)  # [STEP, T]
        odd = tl.load(at + 2 * pair + 1, mask=mask, other=0.0)  # [STEP, T]
    return even, odd
