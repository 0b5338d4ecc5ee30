"""A linear over a packed weight. Where few rows make too few programs, several share the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from ..packed_weight import Scheme
from .launch import device_of, launch
from .packed_weights import InputRows, StoredWeight, Weight, WeightRows, pairable, product, tile_for

_ADDED = 1024  # values that one program adds up
_SHORTEST = 2  # tiles of columns that are worth a program


def packed_linear(x: torch.Tensor, weight: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    stored, device, groups = StoredWeight.of(weight, scheme), device_of(x), x.shape[1] if x.ndim == 3 else 1
    num_tokens, rows = x.shape[0], stored.rows // groups
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    # Gathered columns take registers that the tile for more than 96 tokens needs itself.
    met = num_tokens if stored.tensors.perm is None else min(num_tokens, 96)
    block_k, word, tile, options = tile_for(x.dtype, met)
    tensors, form = stored.fitted(block_k, word, device.native_fp8)
    tiles = triton.cdiv(rows, tile.block_r), triton.cdiv(num_tokens, tile.block_t)
    steps = triton.cdiv(stored.columns, form.block_k)
    wanted = 2 * device.multiprocessors // max(1, tiles[0] * tiles[1] * groups)
    share = max(triton.cdiv(steps, max(1, wanted)), min(_SHORTEST, steps))
    parts = triton.cdiv(steps, share)
    target = torch.empty((parts, *out.shape), dtype=torch.float32, device=x.device) if parts > 1 else out
    launch(
        _linear, (*tiles, groups * parts),
        pairable(x), target, num_tokens, groups, share, tensors, PARTS=parts, FORM=form, TILE=tile, **options,
    )  # fmt: skip
    if parts > 1:
        launch(
            _add, (triton.cdiv(out.numel(), _ADDED),),
            target, out, out.numel(), PARTS=parts, BLOCK=_ADDED, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens", "share"])
def _linear(
    x, out, num_tokens, groups, share, weight: Weight,
    PARTS: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out [PARTS, T, groups, rows]: part p sums the tiles of columns from p * share on."""
    BLOCK_R: tl.constexpr = TILE.block_r
    BLOCK_T: tl.constexpr = TILE.block_t
    STAGES: tl.constexpr = TILE.stages
    COLUMNS: tl.constexpr = FORM.columns
    BLOCK_K: tl.constexpr = FORM.block_k
    group, part = tl.program_id(2) // PARTS, tl.program_id(2) % PARTS
    rows = FORM.rows // groups
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = t.to(tl.int64) * groups + group
    first = part * share
    # out[part, :, group] = x[:, group, columns] @ weight.unflatten(0, (groups, -1))[group, :, columns].T
    acc = product(
        x, InputRows(at, t < num_tokens), weight, weight.perm,
        WeightRows(tl.zeros((BLOCK_R,), tl.int64), group * rows + r, r < rows),
        first, tl.minimum(first + share, tl.cdiv(COLUMNS, BLOCK_K)),
        tl.zeros((BLOCK_R, BLOCK_T), tl.float32), FORM, STAGES,
    )  # fmt: skip
    out += part.to(tl.int64) * num_tokens * FORM.rows
    target = out + at[None, :] * rows + r[:, None]
    mask = (t < num_tokens)[None, :] & (r < rows)[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_T]


@triton.jit(do_not_specialize=["size"])
def _add(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out = parts.sum(0)"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        acc += tl.load(parts + part * size + i, mask=i < size, other=0.0)  # [BLOCK]
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)  # [BLOCK]
