"""What the kernels are compiled for: every op at DeepSeek-V4-Flash's shapes, on tensors without memory.

Each function below calls one op's Triton implementation as the model's layers do; the decorator lists the values of
every axis, and the op runs on each sensible combination of them. An op without Triton kernels has no cases.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_deepseek_v4flash.kv_cache.page_sizes import PageSize, entry_page, state_format, state_page, window_page
from vllm_deepseek_v4flash.ops.packed_weight import Scheme, canonical_shapes, shard_scheme
from vllm_deepseek_v4flash.ops.rows import PagedRows, RowFormat

HIDDEN, HEADS, DIM, ROPE, Q_RANK, O_GROUPS, O_RANK = 4096, 64, 512, 64, 1024, 8, 1024
INDEX_HEADS, INDEX_DIM, TOPK = 64, 128, 512
EXPERTS, CHOSEN, INNER = 256, 6, 2048
STREAMS, WINDOW, CONTEXT = 4, 128, 1 << 20
EPS = 1e-6

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DECODE, PREFILL = (1, 8, 128), 8192
TOKENS = (*DECODE, PREFILL)
CONTEXTS = (1 << 11, 1 << 13, 1 << 17, CONTEXT)  # of the longest request of the step
RANKS = (1, 2, 4, 8)
CACHES = ("fp8", "plain")  # plain: the model's dtype
WEIGHTS = {
    "int4": Scheme("int4", 128, scale_dtype=torch.bfloat16),
    "fp4": Scheme("fp4", 32),
    "int4 zeros": Scheme("int4", 128, zero_points=True, scale_dtype=torch.float16),
    "int4 g64": Scheme("int4", 64, scale_dtype=torch.float16),
    "int4 g32": Scheme("int4", 32, zero_points=True, scale_dtype=torch.bfloat16),
    "int4 act-order": Scheme("int4", 128, act_order=True, scale_dtype=torch.float16),
    "fp8": Scheme("fp8", 128, scale_dtype=torch.float32),
}

Caller = Callable[..., Any]
Op = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One call of an op's Triton implementation."""

    op: str
    axes: dict[str, Any]
    """Axis to value, as the table names them."""
    run: Callable[[], Any]

    @property
    def common(self) -> bool:
        """Whether this is what most users run: bf16 on one rank, few requests decoding or a prefill, at long context.

        Of weights and layers whose kernels differ in sizes and scales alone, one stands for all.
        """
        axes = {"dtype": "bf16", "tokens": 8, "context": CONTEXT, "tp": 1} | self.axes
        if axes.get("weight") in ("int4 zeros", "int4 g64") or axes.get("layer") in ("wq_b", "wo_b", "shared w1"):
            return False
        return (axes["dtype"], axes["context"], axes["tp"]) == ("bf16", CONTEXT, 1) and axes["tokens"] in (8, PREFILL)


CASES: list[Case] = []


def cases(**axes: Iterable[Any]) -> Callable[[Caller], Caller]:
    """Append a case for every combination; the decorated function takes the implementation and a value of each axis."""

    def decorate(function: Caller) -> Caller:
        name = function.__name__
        if importlib.util.find_spec(_module(name)) is not None:
            for values in itertools.product(*axes.values()):
                chosen = dict(zip(axes, values, strict=True))
                if _supported(chosen):
                    CASES.append(Case(name, chosen, functools.partial(_run, function, chosen)))
        return function

    return decorate


def _run(function: Caller, axes: dict[str, Any]) -> None:
    name = function.__name__
    function(getattr(importlib.import_module(_module(name)), name), **axes)


def _module(op: str) -> str:
    return f"vllm_deepseek_v4flash.ops.triton.{op}"


def _supported(axes: dict[str, Any]) -> bool:
    """Only index keys have 4 bits, fp32 models keep plain rows; other dtypes than bf16 are compiled for few shapes.

    So are other weights than int4 in groups of 128 and fp4.
    """
    dtype, rows = axes.get("dtype", "bf16"), axes.get("rows", "plain")
    if rows == "fp4" and axes.get("cache", "keys") != "keys":
        return False
    few = axes.get("tp", 1) == 1 and axes.get("tokens", 8) in (8, PREFILL) and axes.get("context", CONTEXT) == CONTEXT
    if axes.get("weight", "int4") not in ("int4", "fp4"):
        return few and dtype == "bf16"
    return dtype == "bf16" or (few and (dtype == "fp16" or rows == "plain"))


def meta(*shape: int, dtype: torch.dtype | str = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype] if isinstance(dtype, str) else dtype, device="meta")


def row_format(cache: str, dtype: str, dim: int, rope: int = 0) -> RowFormat:
    if cache == "plain":
        return RowFormat.plain(dim, DTYPES[dtype])
    return RowFormat.fp4(dim) if cache == "fp4" else RowFormat.fp8(dim, rope)


def paged(page: PageSize, requests: int) -> PagedRows:
    """Pages as vLLM lays them out, next to those of other layers, for requests of 2^20 tokens."""
    stride = 2 * page.rows * page.row_size
    pages = meta(1000, stride, dtype=page.format.dtype)[:, : page.rows * page.row_size]
    table = meta(requests, CONTEXT // page.block_tokens, dtype=torch.int32)
    return PagedRows(pages, page.rows, page.format, table)


def requests(tokens: int) -> int:
    return 1 if tokens == PREFILL else tokens


def numbers(tokens: int) -> torch.Tensor:
    """Positions or slots."""
    return meta(tokens, dtype=torch.int64)


def request_of(tokens: int) -> torch.Tensor:
    return meta(tokens, dtype=torch.int32)


def window_rows(rows: str, dtype: str, tokens: int) -> PagedRows:
    return paged(window_page(row_format(rows, dtype, DIM, ROPE), WINDOW), requests(tokens))


@cases(dtype=DTYPES, rows=CACHES, tokens=TOKENS, tp=RANKS)
def qnorm_rope_kv_insert(op: Op, dtype: str, rows: str, tokens: int, tp: int) -> None:
    q, kv = meta(tokens, HEADS // tp, DIM, dtype=dtype), meta(tokens, DIM, dtype=dtype)
    op(q, kv, meta(tokens, ROPE), window_rows(rows, dtype, tokens), numbers(tokens), eps=EPS)


@cases(dtype=DTYPES, cache=("CSA", "HCA", "keys"), rows=(*CACHES, "fp4"), tokens=TOKENS)
def compress(op: Op, dtype: str, cache: str, rows: str, tokens: int) -> None:
    ratio, overlap = (128, False) if cache == "HCA" else (4, True)
    dim, rope = (INDEX_DIM, 0) if cache == "keys" else (DIM, ROPE)
    channels = 2 * dim if overlap else dim
    op(
        meta(tokens, channels), meta(tokens, channels), meta(ratio, channels), meta(dim, dtype=dtype), meta(ROPE // 2),
        numbers(tokens), request_of(tokens),
        paged(state_page(state_format(dim, overlap), ratio, overlap), requests(tokens)), numbers(tokens),
        paged(entry_page(row_format(rows, dtype, dim, rope), ratio), requests(tokens)),
        ratio=ratio, eps=EPS, dtype=DTYPES[dtype],
    )  # fmt: skip


@cases(dtype=DTYPES, rows=(*CACHES, "fp4"), tokens=TOKENS, context=CONTEXTS)
def indexer_topk(op: Op, dtype: str, rows: str, tokens: int, context: int) -> None:
    op(
        meta(tokens, INDEX_HEADS, INDEX_DIM, dtype=dtype), meta(tokens, ROPE), meta(tokens, INDEX_HEADS, dtype=dtype),
        paged(entry_page(row_format(rows, dtype, INDEX_DIM), 4), requests(tokens)),
        numbers(tokens), request_of(tokens),
        ratio=4, topk=TOPK, max_entries=context // 4, scale=(INDEX_DIM * INDEX_HEADS) ** -0.5,
    )  # fmt: skip


@cases(dtype=DTYPES, rows=CACHES, layer=("window", "CSA", "HCA"), tokens=TOKENS, context=(1 << 11, CONTEXT), tp=RANKS)
def sparse_attention(op: Op, dtype: str, rows: str, layer: str, tokens: int, context: int, tp: int) -> None:
    ratio = {"window": 0, "CSA": 4, "HCA": 128}[layer]
    max_entries = context // ratio if ratio else 0
    entries = paged(entry_page(row_format(rows, dtype, DIM, ROPE), ratio), requests(tokens)) if ratio else None
    indices = meta(tokens, min(TOPK, max_entries), dtype=torch.int32) if layer == "CSA" else None
    op(
        meta(tokens, HEADS // tp, DIM, dtype=dtype), meta(HEADS // tp), numbers(tokens), request_of(tokens),
        window_rows(rows, dtype, tokens), window_size=WINDOW, scale=DIM**-0.5,
        entries=entries, indices=indices, ratio=ratio, max_entries=max_entries, cos_sin=meta(tokens, ROPE),
    )  # fmt: skip


@cases(dtype=DTYPES, tokens=TOKENS, tp=RANKS)
def grouped_linear(op: Op, dtype: str, tokens: int, tp: int) -> None:
    groups, width = O_GROUPS // tp, HEADS // O_GROUPS * DIM
    op(meta(tokens, groups, width, dtype=dtype), meta(groups * O_RANK, width, dtype=dtype))


def streams_and_output(dtype: str, tokens: int) -> tuple[torch.Tensor, ...]:
    """x, streams, post, comb."""
    x, streams = meta(tokens, HIDDEN, dtype=dtype), meta(tokens, STREAMS, HIDDEN, dtype=dtype)
    return x, streams, meta(tokens, STREAMS), meta(tokens, STREAMS, STREAMS)


def mixing(dtype: str) -> tuple[torch.Tensor, ...]:
    """fn, scale, base, norm_weight."""
    outputs = (2 + STREAMS) * STREAMS
    return meta(outputs, STREAMS * HIDDEN), meta(3), meta(outputs), meta(HIDDEN, dtype=dtype)


MIXING = {"norm_eps": EPS, "hc_eps": 1e-6, "sinkhorn_iters": 20}


@cases(dtype=DTYPES, tokens=TOKENS)
def mhc_pre(op: Op, dtype: str, tokens: int) -> None:
    op(streams_and_output(dtype, tokens)[1], *mixing(dtype), **MIXING)


@cases(dtype=DTYPES, tokens=TOKENS)
def mhc_post_pre(op: Op, dtype: str, tokens: int) -> None:
    op(*streams_and_output(dtype, tokens), *mixing(dtype), **MIXING)


@cases(dtype=DTYPES, tokens=TOKENS)
def mhc_post(op: Op, dtype: str, tokens: int) -> None:
    op(*streams_and_output(dtype, tokens))


@cases(dtype=DTYPES, tokens=TOKENS)
def mhc_head(op: Op, dtype: str, tokens: int) -> None:
    streams = streams_and_output(dtype, tokens)[1]
    op(streams, meta(STREAMS, STREAMS * HIDDEN), meta(1), meta(STREAMS), norm_eps=EPS, hc_eps=1e-6)


@cases(rule=("bias", "hash"), shared=("separate", "fused"), tokens=TOKENS)
def route(op: Op, rule: str, shared: str, tokens: int) -> None:
    bias, expert_ids = (meta(EXPERTS), None) if rule == "bias" else (None, meta(tokens, CHOSEN, dtype=torch.int32))
    options = {"scaling": 1.5, "renormalize": True, "shared": shared == "fused"}
    op(meta(tokens, EXPERTS), CHOSEN, bias=bias, expert_ids=expert_ids, **options)


@cases(dtype=DTYPES, width=(DIM, Q_RANK, HIDDEN), tokens=TOKENS)
def rms_norm(op: Op, dtype: str, width: int, tokens: int) -> None:
    op(meta(tokens, width, dtype=dtype), meta(width, dtype=dtype), EPS)


@cases(dtype=DTYPES, tokens=TOKENS, tp=RANKS)
def swiglu(op: Op, dtype: str, tokens: int, tp: int) -> None:
    op(meta(tokens, INNER // tp, dtype=dtype), meta(tokens, INNER // tp, dtype=dtype), 10.0)


@cases(tokens=TOKENS)
def rope_table(op: Op, tokens: int) -> None:
    op(numbers(tokens), meta(ROPE // 2))


def packed(weight: str, n: int, k: int, *stack: int, full: tuple[int, int]) -> tuple[dict[str, torch.Tensor], Scheme]:
    """A stack of weights [n, k], a rank's part of `full`, and how they are to be read."""
    scheme = WEIGHTS[weight]
    # What is in activation order cannot be cut, and is held whole where experts are parallel.
    scheme = scheme if scheme.act_order else shard_scheme(scheme, (n, k), full)
    shapes = canonical_shapes(scheme, n, k)
    return {name: meta(*stack, *shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}, scheme


def chosen(tokens: int, count: int = CHOSEN) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's weights and experts."""
    return meta(tokens, count), meta(tokens, count, dtype=torch.int64)


# 1024 and 4096 tokens give an expert 24 and 96, for which there are tiles between those of few and of many.
EXPERT_TOKENS = (*TOKENS, 1024, 4096)


@cases(dtype=("bf16",), weight=("int4",), tokens=EXPERT_TOKENS, tp=(1, 8), shared=("fused",))
@cases(dtype=DTYPES, weight=WEIGHTS, tokens=EXPERT_TOKENS, tp=RANKS)
def packed_experts(op: Op, dtype: str, weight: str, tokens: int, tp: int, shared: str = "separate") -> None:
    more = int(shared == "fused")
    w13, scheme13 = packed(weight, INNER // tp, HIDDEN, EXPERTS + more, 2, full=(INNER, HIDDEN))
    w2, scheme2 = packed(weight, HIDDEN, INNER // tp, EXPERTS + more, full=(HIDDEN, INNER))
    x, routing = meta(tokens, HIDDEN, dtype=dtype), chosen(tokens, CHOSEN + more)
    op(x, w13, w2, scheme13, scheme2, *routing, swiglu_limit=10.0)


@cases(dtype=DTYPES, tokens=TOKENS, tp=RANKS)
def fused_experts(op: Op, dtype: str, tokens: int, tp: int) -> None:
    inner = INNER // tp
    w13, w2 = meta(EXPERTS, 2 * inner, HIDDEN, dtype=dtype), meta(EXPERTS, HIDDEN, inner, dtype=dtype)
    op(meta(tokens, HIDDEN, dtype=dtype), w13, w2, *chosen(tokens), swiglu_limit=10.0)


LINEARS = ("wq_a", "wq_b", "wo_a", "wo_b", "shared w1")


@cases(dtype=("bf16",), weight=("fp4", "int4 g32"), layer=("wq_a", "wo_a"), tokens=(8, PREFILL), tp=(1,))
@cases(dtype=DTYPES, weight=("int4", "int4 act-order", "fp8"), layer=LINEARS, tokens=(*TOKENS, 32, 96), tp=(1, 8))
def packed_linear(op: Op, dtype: str, weight: str, layer: str, tokens: int, tp: int) -> None:
    wide = HEADS // O_GROUPS * DIM
    n, k, full, groups = {
        "wq_a": (Q_RANK, HIDDEN, (Q_RANK, HIDDEN), 0),
        "wq_b": (HEADS // tp * DIM, Q_RANK, (HEADS * DIM, Q_RANK), 0),
        "wo_a": (O_GROUPS // tp * O_RANK, wide, (O_GROUPS * O_RANK, wide), O_GROUPS // tp),
        "wo_b": (HIDDEN, O_GROUPS // tp * O_RANK, (HIDDEN, O_GROUPS * O_RANK), 0),
        "shared w1": (INNER // tp, HIDDEN, (INNER, HIDDEN), 0),
    }[layer]
    x = meta(tokens, groups, k, dtype=dtype) if groups else meta(tokens, k, dtype=dtype)
    op(x, *packed(weight, n, k, full=full))
