"""Cached rows: how one vector is stored in a page, and how a paged cache is addressed (docs/model.md, "Row formats").

A row of D values is stored in one of three ways:

| format | quantised part | scales | tail |
|---|---|---|---|
| plain | none: D values of one dtype | | |
| e4m3 | the first `quantised` values, one byte each | one ue8m0 byte per 64 | the rest (the rotary part) in bf16 |
| e2m1 | all D values after a Hadamard transform, two per byte, low nibble first | one ue8m0 byte per 32 | |

A page of N quantised rows holds the N data parts first and then the N scale parts, so that data parts stay aligned to
their own size. Quantisation is the one that V4 was trained with: scale 2^ceil(log2(max(amax, floor) / largest code)).

Values that share a scale and include a NaN or an infinity are stored as scale byte 255, ue8m0's NaN, and codes 0. The
byte is read as an infinite scale, and 0 times infinity is NaN: reading needs no test, and e2m1 needs no NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .torch_or_dtypes import torch

_FP8_MAX, _FP8_FLOOR = 448.0, 1e-4
_FP4_MAX, _FP4_FLOOR = 6.0, 6.0 * 2.0**-126
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class RowFormat:
    """How one row of `dim` values is stored."""

    dim: int
    codec: Literal["plain", "e4m3", "e2m1"]
    dtype: torch.dtype = torch.uint8
    """Dtype of the page tensor: the values' own for plain rows, bytes for the others."""
    quantised: int = 0
    """How many leading values are quantised; the others are kept in bf16."""

    @classmethod
    def plain(cls, dim: int, dtype: torch.dtype) -> RowFormat:
        return cls(dim=dim, codec="plain", dtype=dtype)

    @classmethod
    def fp8(cls, dim: int, rope_dim: int = 0) -> RowFormat:
        """e4m3 for all but the `rope_dim` trailing values, which stay bf16."""
        return cls(dim=dim, codec="e4m3", quantised=dim - rope_dim)

    @classmethod
    def fp4(cls, dim: int) -> RowFormat:
        """Hadamard and e2m1 for all values; `dim` must be a power of two that 32 divides."""
        if dim % 32 or dim & (dim - 1):
            raise ValueError(
                f"4-bit rows need a power of two from 32 up (index_head_dim), got {dim}: use fp8 index rows"
            )
        return cls(dim=dim, codec="e2m1", quantised=dim)

    @property
    def block(self) -> int:
        """Quantised values that share one scale."""
        return 32 if self.codec == "e2m1" else 64

    @property
    def data_size(self) -> int:
        """Elements of `dtype` in a row's data part."""
        if self.codec == "plain":
            return self.dim
        packed = self.quantised // 2 if self.codec == "e2m1" else self.quantised
        return packed + 2 * (self.dim - self.quantised)

    @property
    def num_scales(self) -> int:
        return 0 if self.codec == "plain" else -(-self.quantised // self.block)

    @property
    def row_size(self) -> int:
        """Elements of `dtype` that one row takes in a page."""
        return self.data_size + self.num_scales


@dataclass(frozen=True)
class PagedRows:
    """One paged cache as an op sees it.

    Row n of a request is row n % rows_per_page of the page block_table[request, n // rows_per_page].
    """

    pages: torch.Tensor
    """[P, >= rows_per_page * format.row_size], dtype format.dtype; pages may be strided, each is contiguous."""
    rows_per_page: int
    format: RowFormat
    block_table: torch.Tensor
    """[R, B] int32, the pages of each request in order."""

    def locate(self, request: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and row within it (int64) of row number `row` of each `request`; broadcastable integer tensors."""
        row = row.long()
        page = self.block_table[request.long(), row // self.rows_per_page]
        return page.long(), row % self.rows_per_page


def quantise(x: torch.Tensor, fmt: RowFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, dim] of any float dtype to data [N, data_size] and ue8m0 scales [N, num_scales] (uint8)."""
    if fmt.codec == "plain":
        return x.to(fmt.dtype), x.new_empty((x.shape[0], 0), dtype=fmt.dtype)
    if fmt.codec == "e2m1":
        # An op, which needs torch; formats and sizes do not.
        from .hadamard import hadamard

        codes, scales = _encode_blocks(hadamard(x.float()), fmt)
        low, high = _e2m1_codes(codes).unflatten(-1, (-1, 2)).unbind(-1)
        return low | high << 4, scales
    codes, scales = _encode_blocks(x[:, : fmt.quantised].float(), fmt)
    data = codes.to(torch.float8_e4m3fn).view(torch.uint8)
    tail = x[:, fmt.quantised :].to(torch.bfloat16).contiguous().view(torch.uint8)
    return torch.cat((data, tail), dim=-1), scales


def dequantise(data: torch.Tensor, scales: torch.Tensor, fmt: RowFormat) -> torch.Tensor:
    """[..., data_size] and [..., num_scales] to [..., dim] fp32, as `quantise` took it; 4-bit rows stay transformed."""
    if fmt.codec == "plain":
        return data.float()
    if fmt.codec == "e2m1":
        nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
        table = torch.tensor(_FP4_VALUES + tuple(-v for v in _FP4_VALUES), device=data.device)
        values, tail = table[nibbles.long()], None
    else:
        values = data[..., : fmt.quantised].contiguous().view(torch.float8_e4m3fn).float()
        # bf16 is the upper half of fp32. A view would need even offsets, which an odd `quantised` does not give.
        low, high = data[..., fmt.quantised :].int().unflatten(-1, (-1, 2)).unbind(-1)
        tail = (low << 16 | high << 24).view(torch.float32)
    values = values * _power_of_two(scales).repeat_interleave(fmt.block, dim=-1)[..., : fmt.quantised]
    return values if tail is None else torch.cat((values, tail), dim=-1)


def write_rows(cache: PagedRows, page: torch.Tensor, row: torch.Tensor, values: torch.Tensor) -> None:
    """Store values [N, dim] at (page, row) [N]; a negative page is a padded token and writes nothing."""
    kept = page >= 0
    page, row = page[kept].long(), row[kept].long()
    data, scales = _sections(cache)
    row_data, row_scales = quantise(values[kept], cache.format)
    data[page, row] = row_data
    if cache.format.num_scales:
        scales[page, row] = row_scales


def read_rows(cache: PagedRows, page: torch.Tensor, row: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Rows at (page, row) [...] as [..., dim] fp32; where `valid` is False the row is zero and its memory is not read.

    Unwritten cache memory may hold NaN, so an invalid row must be replaced, never multiplied by zero.
    """
    data, scales = _sections(cache)
    page, row = page.where(valid, 0), row.where(valid, 0)
    values = dequantise(data[page, row], scales[page, row], cache.format)
    return values.where(valid[..., None], 0.0)


def _sections(cache: PagedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the data [P, N, data_size] and scale [P, N, num_scales] parts of the pages."""
    fmt, rows = cache.format, cache.rows_per_page
    data_end, end = rows * fmt.data_size, rows * fmt.row_size
    data = cache.pages[:, :data_end].unflatten(1, (rows, fmt.data_size))
    return data, cache.pages[:, data_end:end].unflatten(1, (rows, fmt.num_scales))


def _encode_blocks(x: torch.Tensor, fmt: RowFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, quantised] fp32 to values divided by their block's scale and clamped, and the scales' ue8m0 bytes."""
    largest, floor = (_FP4_MAX, _FP4_FLOOR) if fmt.codec == "e2m1" else (_FP8_MAX, _FP8_FLOOR)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % fmt.block)).unflatten(-1, (-1, fmt.block))
    finite = padded.isfinite().all(-1, keepdim=True)
    padded = padded.where(finite, 0.0)
    amax = padded.abs().amax(-1, keepdim=True).clamp(min=floor)
    scales = (_ceil_log2(amax * (1.0 / largest)) + 127).to(torch.uint8)
    values = (padded * _power_of_two(254 - scales)).clamp(-largest, largest)
    scales = scales.where(finite, 255)
    return values.flatten(-2)[..., : x.shape[-1]], scales.squeeze(-1)


def _power_of_two(ue8m0: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) in fp32, exact for the bytes 1..254 that `quantise` writes; infinity for 255."""
    return (ue8m0.to(torch.int32) << 23).view(torch.float32)


def _ceil_log2(x: torch.Tensor) -> torch.Tensor:
    """ceil(log2(x)) as int32, exact for every positive normal fp32."""
    mantissa, exponent = torch.frexp(x)
    return torch.where(mantissa == 0.5, exponent - 1, exponent)


def _e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Round |x| <= 6 to e2m1, ties to the even code: [...] fp32 to uint8 codes 0..15."""
    a = x.abs()
    # Each threshold is halfway between two codes; >= where the upper of the two is even.
    code = sum(
        (above.to(torch.uint8) for above in (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)),
        start=torch.zeros_like(a, dtype=torch.uint8),
    )
    return code | (x < 0).to(torch.uint8) << 3
