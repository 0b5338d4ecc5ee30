"""The exact selection of the largest scores of each row, listed by index.

One program chooses from one segment of a row: it keeps the scores in registers and finds the k-th largest bit by bit,
each bit by counting what is not below a guess. (A histogram of 8-bit digits takes fewer rounds, but it is made of
ballots: some 60 instructions for a score and digit, against 3 for a score and bit.) What the segments of a row choose
is chosen from again until it fits one segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Pointer, Strided, block, launch

SEGMENT = 16384
"""Scores that one program chooses from: near sqrt(262144 * 512), where both rounds of that choice take as long."""
SMALL_SEGMENT = 2048
"""What it takes in where no more is left, as for every context of up to 8k tokens; and the step of its last pass."""


class Kept(NamedTuple):
    """What the segments of a round choose, [T, segments * K]; rows have one stride."""

    scores: Pointer
    indices: Pointer
    stride: int


class Plan(NamedTuple):
    """What the kernel is compiled for."""

    width: int
    """Scores that a row keeps."""
    level: int
    """The round, from 0."""
    segment: int
    small: int
    """Scores of a segment that has no more, and of a step of its last pass."""
    block_w: int
    """The power of two that holds `width`."""


def topk(scores: torch.Tensor, counts: torch.Tensor, selected: torch.Tensor, *, limit: int) -> None:
    """Write the indices of each row's largest scores, ascending and then -1.

    Scores rank descending, equal ones (zeros of either sign too) by index ascending; NaN ranks as -inf. Scores from
    `counts` on are not read, nor any of a row that has no more than K.

    Args:
        scores: [T, N] fp32, rows may be strided. counts: [T] int32, how many scores a row has, at most `limit`.
        selected: [T, K] int32, receives the result; rows may be strided.
        limit: a bound of `counts` that the host knows, at most N.
    """
    num_tokens, width = selected.shape
    if width == 0:
        return
    segment = max(SEGMENT, block(2 * width))
    source, indices, level = scores, selected, 0
    while True:
        segments = max(1, triton.cdiv(limit, segment))
        room = (num_tokens, segments * width if segments > 1 else 0)
        kept = torch.empty(room, dtype=torch.float32, device=scores.device)
        kept_indices = torch.empty(room, dtype=torch.int32, device=scores.device)
        plan = Plan(width, level, segment, min(SMALL_SEGMENT, segment), block(width))
        launch(
            _select, (num_tokens, segments),
            Strided(source, source.stride(0)), Strided(indices, indices.stride(0)), counts,
            Kept(kept, kept_indices, kept.stride(0)), Strided(selected, selected.stride(0)), PLAN=plan, num_warps=16,
        )  # fmt: skip
        if segments == 1:
            return
        source, indices, limit, level = kept, kept_indices, segments * width, level + 1


@triton.jit
def _select(scores: Strided, indices: Strided, counts, kept: Kept, selected: Strided, PLAN: tl.constexpr):
    """One segment of one row in round `level`, which ends the rows that fit one segment."""
    WIDTH: tl.constexpr = PLAN.width
    LEVEL: tl.constexpr = PLAN.level
    SEGMENT: tl.constexpr = PLAN.segment
    SMALL: tl.constexpr = PLAN.small
    t, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + t)
    ended = False
    for _ in tl.static_range(LEVEL):
        ended |= count <= SEGMENT
        # Every segment but the last had more than it could keep.
        count = count // SEGMENT * WIDTH + tl.minimum(count % SEGMENT, WIDTH)
    start = part * SEGMENT
    if not ended and (start < count or part == 0):
        final_indices = selected.data + t * selected.stride
        if LEVEL == 0 and count <= WIDTH:
            w = tl.arange(0, PLAN.block_w)
            tl.store(final_indices + w, tl.where(w < count, w, -1), mask=w < WIDTH)  # [BLOCK_W]
        else:
            row = scores.data + t * scores.stride + start
            left = tl.minimum(count - start, SEGMENT)
            if left <= SMALL:
                threshold, room = _threshold(row, left, WIDTH, SMALL)
            else:
                threshold, room = _threshold(row, left, WIDTH, SEGMENT)
            is_last = count <= SEGMENT
            kept_scores = kept.scores + t * kept.stride + part * WIDTH
            kept_indices = kept.indices + t * kept.stride + part * WIDTH
            if is_last:
                kept_indices = final_indices
            # chosen = (key > threshold) | (key == threshold) & (rank among equals < room), in order of index
            for first in range(0, left, SMALL):
                i = first + tl.arange(0, SMALL)
                score = tl.load(row + i, mask=i < left, other=0.0)  # [SMALL]
                key = tl.where(i < left, _rank(score), 0)
                larger, equal = key > threshold, (key == threshold) & (i < left)
                # One sum counts both kinds before each score, the larger in its lower half.
                ones = larger.to(tl.int32) + (equal.to(tl.int32) << 16)
                before = tl.cumsum(ones) - ones
                chosen = larger | (equal & (before >> 16 < room))
                at = (before & 0xFFFF) + tl.minimum(before >> 16, room)
                index = start + i
                if LEVEL > 0:
                    index = tl.load(indices.data + t * indices.stride + index, mask=chosen, other=0)  # [SMALL]
                tl.store(kept_indices + at, index, mask=chosen)  # [SMALL]
                if not is_last:
                    tl.store(kept_scores + at, score, mask=chosen)  # [SMALL]
                both = tl.sum(ones)
                taken = tl.minimum(both >> 16, room)
                room -= taken
                kept_scores += (both & 0xFFFF) + taken
                kept_indices += (both & 0xFFFF) + taken


@triton.jit
def _threshold(scores, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rank of the WIDTH-th largest of `count` <= BLOCK scores, and how many scores of that rank are among them."""
    i = tl.arange(0, BLOCK)
    key = tl.where(i < count, _rank(tl.load(scores + i, mask=i < count, other=0.0)), 0)  # [BLOCK]
    threshold = tl.zeros((), tl.uint32)
    bit = tl.where(count > WIDTH, 31, -1)
    while bit >= 0:
        guess = threshold | (tl.full((), 1, tl.uint32) << bit.to(tl.uint32))
        reach = tl.sum((key >= guess).to(tl.int32))
        threshold = tl.where(reach >= WIDTH, guess, threshold)
        # Where exactly WIDTH scores reach the guess, finer ones change nothing.
        bit = tl.where(reach == WIDTH, -1, bit - 1)
    return threshold, WIDTH - tl.sum((key > threshold).to(tl.int32))


@triton.jit
def _rank(score):
    """fp32 to uint32 in the same order: 0 for nothing, -0 as +0, NaN as -inf."""
    bits = score.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, tl.where(magnitude > 0x7F800000, 0xFF800000, bits))
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
