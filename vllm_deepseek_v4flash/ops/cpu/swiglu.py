from __future__ import annotations

import numpy as np
import torch

from . import threads
from .arithmetic import INFINITY, ONE, exp
from .compiling import helper, kernel
from .memory import code, get, load, packed, put, size_of

_PART = 1024  # values converted together


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    gate, up = packed(gate, up)
    out = torch.empty(gate.shape, dtype=torch.float32)
    threads.run(
        _swiglu, -(-gate.numel() // _PART), 20.0 * gate.numel(), _PART,
        gate.data_ptr(), code(gate), up.data_ptr(), code(up), np.inf if limit is None else limit, out.data_ptr(),
        gate.numel(),
    )  # fmt: skip
    return out


@helper
def activate(gate, up, limit):
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)`."""
    if limit < INFINITY:
        gate = limit if gate > limit else gate
        up = limit if up > limit else (-limit if up < -limit else up)
    return gate / (ONE + exp(-gate)) * up


@kernel
def _swiglu(
    begin: int, end: int, room: int,
    gate: int, gate_dtype: int, up: int, up_dtype: int, limit: float, out: int, size: int,
) -> None:  # fmt: skip
    for part in range(begin, end):
        start = part * _PART
        count = min(_PART, size - start)
        values = out + 4 * start
        load(gate + start * size_of(gate_dtype), gate_dtype, count, room)
        load(up + start * size_of(up_dtype), up_dtype, count, values)
        for i in range(count):
            put(values, i, activate(get(room, i), get(values, i), limit))
