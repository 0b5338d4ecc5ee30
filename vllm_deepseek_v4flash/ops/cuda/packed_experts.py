from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import math
from collections.abc import Mapping

import torch

from ...log import info_once, logger_name
from ..dispatch import OPS_ENV, chosen
from ..packed_weight import Scheme
from ..triton.packed_experts import packed_experts as triton_packed_experts
from .library import Buffers, Routing, Weights, library

MOST_TOKENS = 32
"""Of a batch; in larger ones, experts have enough rows for Triton's kernels."""

logger = logging.getLogger(logger_name(__name__))

_KINDS = ("int4", "fp4")
_FP4 = 4  # of csrc/weights.cuh's formats
_SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
_COLUMNS = 32  # that one step of the kernels takes; its 16 bytes must be aligned
_STAGE = 256  # columns of a warp's stage: rows of activations are padded to it
_SEGMENT = 1024  # columns whose products one warp sums up
_UP_TILE, _DOWN_TILE = 16, 32  # rows of one unit, of W1 and of W2
_PLAN_BYTES, _CHUNK_BYTES = 144, 80  # csrc/plan.cuh's Plan up to its chunks, and a chunk
_MOST_TOPK = 32


def packed_experts(
    x: torch.Tensor,
    w13: Mapping[str, torch.Tensor],
    w2: Mapping[str, torch.Tensor],
    scheme13: Scheme,
    scheme2: Scheme,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    swiglu_limit: float | None,
    first_expert: int = 0,
) -> torch.Tensor:
    """Small batches in bf16; Triton computes all others.

    Raises:
        ValueError: the environment asks for these kernels, and they cannot compute this layer.
    """
    reason = unsuitable(x.dtype, scheme13, scheme2, x.shape[1], w2, topk_ids.shape[1])
    if reason is not None:
        if chosen() == "cuda":
            raise ValueError(
                f"{OPS_ENV}=cuda: csrc/'s experts cannot compute {reason}. Leave {OPS_ENV} unset for Triton's kernels."
            )
        info_once(logger, "Experts run in Triton's kernels only; csrc/'s cannot compute %s.", reason)
    else:
        info_once(
            logger,
            "Experts run in csrc/'s kernels for up to %d tokens at a time, and in Triton's beyond.",
            MOST_TOKENS,
        )
    if reason is not None or not 0 < x.shape[0] <= MOST_TOKENS:
        return triton_packed_experts(
            x, w13, w2, scheme13, scheme2, topk_weights, topk_ids, swiglu_limit=swiglu_limit, first_expert=first_expert
        )
    x, ids, weights = x.contiguous(), topk_ids.to(torch.int64).contiguous(), topk_weights.contiguous()
    (tokens, topk), hidden, inner = topk_ids.shape, x.shape[1], 2 * w2["qweight"].shape[-1]
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    *offsets, size = layout(tokens, topk, hidden, inner)
    scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
    base, arrived = scratch.data_ptr(), _counters(x.device, counters(hidden, inner, topk))
    to = Buffers(
        x.data_ptr(), *(base + offset for offset in offsets), arrived.data_ptr(),
        out.data_ptr(), hidden, inner, _narrow(scheme13), _narrow(scheme2),
    )  # fmt: skip
    routing = Routing(ids.data_ptr(), weights.data_ptr(), tokens, topk, first_expert, w2["qweight"].shape[0])
    status = library().deepseek_v4flash_experts(
        format_of(scheme13), format_of(scheme2), _weights(w13, scheme13), _weights(w2, scheme2),
        ctypes.byref(routing), ctypes.byref(to), math.inf if swiglu_limit is None else swiglu_limit, _stream(x.device),
    )  # fmt: skip
    if status:
        raise RuntimeError(f"the experts' CUDA kernels did not start: cudaError {status}")
    return out


@functools.cache
def layout(tokens: int, topk: int, hidden: int, inner: int) -> tuple[int, ...]:
    """Where `plan`, `rows`, `activation`, `halves` and `products` of csrc/plan.cuh start, and the size of all."""
    pairs = tokens * topk
    sizes = (
        _PLAN_BYTES + _CHUNK_BYTES * pairs,
        2 * (tokens + 1) * _padded(hidden),
        2 * (pairs + 1) * _padded(inner),
        4 * -(-hidden // _SEGMENT) * pairs * 2 * inner,
        4 * -(-inner // _SEGMENT) * pairs * hidden,
    )
    return tuple(itertools.accumulate((-(-size // 256) * 256 for size in sizes), initial=0))


def counters(hidden: int, inner: int, topk: int) -> int:
    """How many counters the largest batch needs."""
    return MOST_TOKENS * (topk * (inner // _UP_TILE) + hidden // _DOWN_TILE)


def format_of(scheme: Scheme) -> int:
    """csrc/weights.cuh's `Format`."""
    return _FP4 if scheme.kind == "fp4" else scheme.zero_points + 2 * _narrow(scheme)


def _narrow(scheme: Scheme) -> bool:
    return scheme.kind == "int4" and scheme.group_size in (32, 64)


def _padded(columns: int) -> int:
    return -(-columns // _STAGE) * _STAGE


def unsuitable(
    dtype: torch.dtype, scheme13: Scheme, scheme2: Scheme, hidden: int, w2: Mapping[str, torch.Tensor], topk: int = 1
) -> str | None:
    """Why these kernels cannot compute a layer, whatever its tokens; None where they can."""
    if dtype != torch.bfloat16:
        return f"activations in {dtype}, not bfloat16"
    if scheme13.kind != scheme2.kind or scheme13.kind not in _KINDS:
        return f"weights in {scheme13.kind} and {scheme2.kind}, not both in int4 or fp4"
    if scheme13.act_order or scheme2.act_order:
        return "weights in activation order"
    if topk > _MOST_TOPK:
        return f"{topk} experts for each token, more than {_MOST_TOPK}"
    for columns, scheme in ((hidden, scheme13), (2 * w2["qweight"].shape[-1], scheme2)):
        whole = scheme.group_size % 256 == 0 or scheme.group_size in (32, 64, 128) or scheme.group_size == columns
        if columns % _COLUMNS or not whole:
            return f"{columns} columns in groups of {scheme.group_size}, not in whole steps of {_COLUMNS}"
    return None


def _weights(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> ctypes._Pointer[Weights]:
    codes, scales, zeros = tensors["qweight"], tensors["scales"], tensors.get("zeros")
    # Of w13, [E, 2, I, ...], the kernels see one stack of 2 I rows.
    rows = math.prod(codes.shape[1:-1])
    return ctypes.pointer(
        Weights(
            codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(),
            _SCALE_TYPES[scales.dtype], scheme.group_size, rows, 2 * codes.shape[-1],
            min(_SEGMENT, 2 * codes.shape[-1]),
        )
    )  # fmt: skip


@functools.cache
def _counters(device: torch.device, count: int) -> torch.Tensor:
    """Zero before and after every launch, so one allocation serves all layers; steps on one device do not overlap."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
