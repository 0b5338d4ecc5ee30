"""Which keys a program of sparse attention takes: tiles of window rows, then of compressed entries.

`PLAN` is `sparse_attention.Plan`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Run(NamedTuple):
    """Consecutive tokens of one request, inside a kernel."""

    start: Any
    """The first token."""
    first: Any
    """Its position."""
    final: Any
    """The last token's position."""
    owner: Any
    """The request; -1 if there is no such run."""


class Reach(NamedTuple):
    """The keys that a run's tokens may see, inside a kernel: tiles of the window, then of the entries."""

    oldest: Any
    """The first row of the window."""
    final: Any
    """Its last row."""
    lowest: Any
    """Its first tile."""
    window_tiles: Any
    tiles: Any
    visible: Any
    """Entries before this one are visible."""


@triton.jit
def run_of(positions, request, t0, num_tokens, n, BLOCK_T: tl.constexpr):
    """Of a block's runs of consecutive tokens of one request, the n-th."""
    if BLOCK_T == 1:
        start, first = t0, tl.load(positions + t0).to(tl.int32)
        owner = tl.load(request + t0).to(tl.int32)
        final = first
    else:
        b = t0 + tl.arange(0, BLOCK_T)
        inside, follows = b < num_tokens, (b < num_tokens) & (b > t0)
        position = tl.load(positions + b, mask=inside, other=0).to(tl.int32)  # [BLOCK_T]
        whose = tl.load(request + b, mask=inside, other=-1).to(tl.int32)  # [BLOCK_T]
        before = tl.load(positions + b - 1, mask=follows, other=0).to(tl.int32)  # [BLOCK_T]
        whose_before = tl.load(request + b - 1, mask=follows, other=-1).to(tl.int32)  # [BLOCK_T]
        breaks = follows & ((position != before + 1) | (whose != whose_before))
        mine = inside & (tl.cumsum(breaks.to(tl.int32), axis=0) == n)
        start = tl.min(tl.where(mine, b, 2147483647), axis=0)
        first = tl.min(tl.where(mine, position, 2147483647), axis=0)
        final = tl.max(tl.where(mine, position, -1), axis=0)
        owner = tl.max(tl.where(mine, whose, -1), axis=0)
    return Run(start, first, final, owner)


@triton.jit
def reach_of(run: Run, indices, window_size, num_entries, PLAN: tl.constexpr):
    """What the tokens of a run may see; `indices` is the list of the only one, if PLAN.listed."""
    oldest = tl.maximum(run.first - window_size + 1, 0)
    lowest = oldest // PLAN.block_k
    window_tiles = tl.where(run.final >= 0, run.final // PLAN.block_k - lowest + 1, 0)
    tiles, visible = window_tiles, 0
    if PLAN.ratio > 0:
        visible = (run.final + 1) // PLAN.ratio
        if PLAN.listed:
            # Where lists end in entries that do not count, as those of early tokens do, the end is left out.
            column = tl.arange(0, PLAN.columns)
            listed = tl.load(indices + column, mask=column < num_entries, other=-1)  # [COLUMNS]
            count = tl.max(tl.where((listed >= 0) & (listed < visible), column + 1, 0), axis=0)
        else:
            visible = tl.minimum(visible, num_entries)
            count = visible
        tiles += (count + PLAN.block_k - 1) // PLAN.block_k
    return Reach(oldest, run.final, lowest, window_tiles, tiles, visible)


@triton.jit
def numbers(i, end, reach: Reach, indices, num_entries, PLAN: tl.constexpr):
    """The row numbers of tile i < end [BLOCK_K], which of them any token may see, and whether it is the window's."""
    in_window = i < reach.window_tiles
    tile = tl.where(in_window, reach.lowest + i, i - reach.window_tiles)
    number = tile * PLAN.block_k + tl.arange(0, PLAN.block_k)
    if PLAN.listed:
        columns = tl.where((i >= reach.window_tiles) & (i < end), num_entries, 0)
        listed = tl.load(indices + number, mask=number < columns, other=-1)  # [BLOCK_K]
        number = tl.where(in_window, number, listed)
    newest = tl.where(i < end, tl.where(in_window, reach.final, reach.visible - 1), -1)
    return number, (number >= tl.where(in_window, reach.oldest, 0)) & (number <= newest), in_window
