from __future__ import annotations

import math

import numpy as np
import torch

from ..rows import PagedRows
from . import threads
from .arithmetic import INFINITY, ZERO, exp
from .compiling import Cache, helper, kernel
from .memory import CODES, code, fill, get, get_i64, integer, load, packed, put, rounded
from .paged import cache, page_at, page_of, write_row
from .qnorm_rope_kv_insert import rotate_rounded
from .rms_norm import normalise

_STATES, _ENTRIES = 1, 2  # what a call of the kernel writes
_FEW = 64  # tokens processed per call


def compress(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    inv_freq: torch.Tensor,
    positions: torch.Tensor,
    request: torch.Tensor,
    states: PagedRows,
    state_slots: torch.Tensor,
    entries: PagedRows,
    *,
    ratio: int,
    eps: float,
    dtype: torch.dtype,
) -> None:
    num_tokens, channels = kv.shape
    dim = entries.format.dim
    kv, gate, ape, norm_weight, inv_freq = packed(kv, gate, ape, norm_weight, inv_freq)
    positions, request, state_slots = packed(positions, request, state_slots)
    # Entries pool states of this step, so no thread may begin one before all states are written.
    for phase in (_STATES | _ENTRIES,) if num_tokens <= _FEW else (_STATES, _ENTRIES):
        threads.run(
            _compress, num_tokens, 8.0 * kv.numel() if num_tokens > _FEW else 0.0, 5 * dim + 2 * inv_freq.shape[0],
            phase, kv.data_ptr(), gate.data_ptr(), ape.data_ptr(), channels, dim,
            norm_weight.data_ptr(), code(norm_weight), inv_freq.data_ptr(), inv_freq.shape[0],
            positions.data_ptr(), request.data_ptr(), request.element_size() == 8,
            cache(states), state_slots.data_ptr(), cache(entries), ratio, eps, CODES[dtype],
        )  # fmt: skip


@helper
def _state(states, owner, token):
    """The address of a token's state row, which is plain fp32."""
    page, row = page_of(states, owner, token)
    return page + 4 * row * states[4]


@helper
def _pool(states, owner, last, ratio, channels, dim, tops, totals, sums):
    """The gated sum of the window that ends at position `last`: per channel, a softmax over its tokens."""
    overlap = channels == 2 * dim
    first = last - (2 * ratio if overlap else ratio) + 1
    fill(tops, dim, -INFINITY)
    fill(totals, 2 * dim, ZERO)  # and the sums, which follow
    for sweep in range(2):
        for token in range(max(first, 0), last + 1):
            # The first half of an overlapping pool takes the first channels, the second half the others.
            shift = 4 * dim if overlap and token > last - ratio else 0
            row = _state(states, owner, token) + shift
            gates = row + 4 * channels
            if sweep == 0:
                for d in range(dim):
                    gate, top = get(gates, d), get(tops, d)
                    put(tops, d, gate if gate > top or gate != gate else top)
            else:
                for d in range(dim):
                    weight = exp(get(gates, d) - get(tops, d))
                    put(totals, d, get(totals, d) + weight)
                    put(sums, d, get(sums, d) + weight * get(row, d))
    for d in range(dim):
        put(sums, d, get(sums, d) / get(totals, d))


@kernel
def _compress(
    begin: int, end: int, room: int,
    phase: int, kv: int, gate: int, ape: int, channels: int, dim: int,
    norm_weight: int, norm_dtype: int, inv_freq: int, pairs: int,
    positions: int, request: int, wide: bool,
    states: Cache, state_slots: int, entries: Cache, ratio: int, eps: float, dtype: int,
) -> None:  # fmt: skip
    if phase & _STATES:
        for t in range(begin, end):
            slot = get_i64(state_slots, t)
            if slot >= 0:
                page, row = page_at(states, slot)
                out = page + 4 * row * 2 * channels
                bias = ape + 4 * (get_i64(positions, t) % ratio) * channels
                load(kv + 4 * t * channels, 0, channels, out)
                for c in range(channels):
                    put(out, channels + c, get(gate, t * channels + c) + get(bias, c))
    if phase & _ENTRIES:
        weight, tops = room, room + 4 * dim
        totals, sums, table = tops + 4 * dim, tops + 8 * dim, tops + 12 * dim
        load(norm_weight, norm_dtype, dim, weight)
        for t in range(begin, end):
            last = get_i64(positions, t)
            if (last + 1) % ratio == 0 and get_i64(state_slots, t) >= 0:
                owner = integer(request, wide, t)
                _pool(states, owner, last, ratio, channels, dim, tops, totals, sums)
                for d in range(dim):
                    put(sums, d, rounded(get(sums, d), dtype))
                normalise(sums, dim, weight, eps, dtype)
                for k in range(pairs):
                    angle = np.float32(last - (ratio - 1)) * get(inv_freq, k)
                    put(table, k, math.cos(angle))
                    put(table, pairs + k, math.sin(angle))
                rotate_rounded(sums, dim, table, 2 * pairs, dtype)
                page, row = page_of(entries, owner, last // ratio)
                write_row(entries, page, row, sums)
