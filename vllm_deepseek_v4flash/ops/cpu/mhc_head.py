from __future__ import annotations

import torch

from . import threads
from .arithmetic import ONE
from .compiling import kernel
from .memory import code, get, load, packed, size_of, store
from .mixing import gates, mix, weighted_streams


def mhc_head(
    streams: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, *, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    num_tokens, n, hidden = streams.shape
    streams, fn, scale, base = packed(streams, fn, scale, base)
    out = streams.new_empty((num_tokens, hidden))
    threads.run(
        _merge, num_tokens, float(n * streams.numel()), (n + 1) * hidden + n + 4,
        streams.data_ptr(), code(streams), n, hidden, fn.data_ptr(), scale.data_ptr(), base.data_ptr(),
        norm_eps, hc_eps, out.data_ptr(),
    )  # fmt: skip
    return out


@kernel
def _merge(
    begin: int, end: int, room: int,
    streams: int, dtype: int, n: int, hidden: int, fn: int, scale: int, base: int,
    norm_eps: float, hc_eps: float, out: int,
) -> None:  # fmt: skip
    size = size_of(dtype)
    flat, row = room, room + 4 * n * hidden
    pre = row + 4 * hidden
    for t in range(begin, end):
        load(streams + t * n * hidden * size, dtype, n * hidden, flat)
        mix(flat, n * hidden, fn, n, norm_eps, pre)
        gates(pre, get(scale, 0), base, n, hc_eps, ONE, pre)
        weighted_streams(flat, n, hidden, pre, row)
        store(out + t * hidden * size, dtype, hidden, row)
