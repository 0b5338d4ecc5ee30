from __future__ import annotations

import torch

from . import threads
from .compiling import kernel
from .memory import code, load, packed, size_of, store
from .mhc_post_pre import spread_output


def mhc_post(x: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    num_tokens, n, hidden = streams.shape
    x, streams, post, comb = packed(x, streams, post, comb)
    out = torch.empty_like(streams)
    threads.run(
        _leave, num_tokens, float(n * streams.numel()), (2 * n + 1) * hidden,
        x.data_ptr(), streams.data_ptr(), code(streams), n, hidden, post.data_ptr(), comb.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


@kernel
def _leave(
    begin: int, end: int, room: int,
    x: int, streams: int, dtype: int, n: int, hidden: int, post: int, comb: int, out: int,
) -> None:  # fmt: skip
    size = size_of(dtype)
    before, after, output = room, room + 4 * n * hidden, room + 8 * n * hidden
    for t in range(begin, end):
        load(streams + t * n * hidden * size, dtype, n * hidden, before)
        load(x + t * hidden * size, dtype, hidden, output)
        spread_output(output, before, post + 4 * t * n, comb + 4 * t * n * n, n, hidden, dtype, after)
        store(out + t * n * hidden * size, dtype, n * hidden, after)
