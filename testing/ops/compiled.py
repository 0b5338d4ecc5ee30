"""What compiled kernels compute, at the tiles of DeepSeek-V4-Flash's shapes, in bf16, and what must come out."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from vllm_deepseek_v4flash.ops.packed_weight import dequantise
from vllm_deepseek_v4flash.ops.rows import PagedRows, RowFormat

from ..ptxrun.executable import Schedule
from ..ptxrun.verify import SCHEDULES
from .attention import attend
from .mhc import OPTIONS, check_entered, entering, leaving
from .numeric import FUNCTION, U32, U, assert_within, f64, integers, normal
from .packed_weights import check_experts, dense, experts_in_fp64, random_weight, scheme_of, stacked
from .paging import make_cache

BF16 = torch.bfloat16
CPU = torch.device("cpu")
HIDDEN, HEADS, DIM, ROPE, WINDOW = 4096, 64, 512, 64, 128


@dataclass(frozen=True)
class Case:
    compute: Callable[[], Any]
    check: Callable[[Any], None]
    schedules: tuple[Schedule, ...] = SCHEDULES


def module_of(op: str) -> ModuleType:
    """The module of an op's Triton kernels."""
    return importlib.import_module(f"vllm_deepseek_v4flash.ops.triton.{op}")


def rms_norm(rng: torch.Generator, width: int = 512, module: ModuleType | None = None) -> Case:
    x, weight = normal(rng, 9, width, dtype=BF16), normal(rng, width, dtype=BF16)
    expected = f64(x) * (f64(x).square().mean(-1, keepdim=True) + 1e-6).rsqrt() * f64(weight)

    def check(actual: torch.Tensor) -> None:
        assert_within(actual, expected, (width * U32 + FUNCTION) * expected.abs())

    op = (module or module_of("rms_norm")).rms_norm
    return Case(lambda: op(x, weight, 1e-6), check)


def route(rng: torch.Generator, module: ModuleType | None = None) -> Case:
    logits, bias, topk = normal(rng, 9, 256, scale=3), normal(rng, 256), 6
    scores = torch.nn.functional.softplus(f64(logits)).sqrt()
    chosen = (scores + f64(bias)).argsort(dim=1, descending=True, stable=True)[:, :topk]
    expected = scores.gather(1, chosen)
    expected = expected / expected.sum(1, keepdim=True) * 1.5

    def check(actual: tuple[torch.Tensor, torch.Tensor]) -> None:
        weights, ids = actual
        assert torch.equal(ids, chosen)
        assert_within(weights, expected, (3 * FUNCTION + (topk + f64(logits).abs().max()) * U32) * expected)

    op = (module or module_of("route")).route
    return Case(lambda: op(logits, topk, bias=bias, expert_ids=None, scaling=1.5), check)


def mhc_pre(rng: torch.Generator) -> Case:
    arguments = entering(rng, CPU, tokens=3, n=4, hidden=HIDDEN, dtype=BF16, norm=True)
    op = module_of("mhc_pre").mhc_pre
    return Case(lambda: op(*arguments, **OPTIONS), lambda actual: check_entered(actual, *arguments, **OPTIONS))


def mhc_post(rng: torch.Generator) -> Case:
    x, streams, post, comb = leaving(rng, CPU, tokens=3, n=4, hidden=HIDDEN, dtype=BF16)
    terms = torch.cat(
        (f64(post)[:, None, :, None] * f64(x)[:, None, None], f64(comb)[..., None] * f64(streams)[:, :, None]), dim=1
    )

    def check(actual: torch.Tensor) -> None:
        assert_within(actual, terms.sum(1), (4 + 2) * U32 * terms.abs().sum(1))

    op = module_of("mhc_post").mhc_post
    return Case(lambda: op(x, streams, post, comb), check)


def swiglu(rng: torch.Generator) -> Case:
    gate, up = (normal(rng, 3, 2048, scale=6, dtype=BF16) for _ in range(2))
    expected = torch.nn.functional.silu(f64(gate).clamp(max=10)) * f64(up).clamp(-10, 10)

    def check(actual: torch.Tensor) -> None:
        # exp of x errs by |x| * U32 more than by its own ulp where it is computed through exp2; |x| < 30 here.
        assert_within(actual, expected, (FUNCTION + 30 * U32) * expected.abs())

    op = module_of("swiglu").swiglu
    return Case(lambda: op(gate, up, 10.0), check)


def rope_table(rng: torch.Generator) -> Case:
    positions, inv_freq = torch.randint(0, 2**20, (70,), generator=rng), torch.rand(ROPE // 2, generator=rng)
    angles = (positions.float()[:, None] * inv_freq).double()
    expected = torch.cat((angles.cos(), angles.sin()), dim=1)

    def check(actual: torch.Tensor) -> None:
        # The angle is exact; values of at most 1, to 4 ulp of the half below it.
        assert_within(actual, expected, torch.full_like(expected, 4 * U32))

    op = module_of("rope_table").rope_table
    return Case(lambda: op(positions, inv_freq), check)


def packed_linear(rng: torch.Generator, name: str = "int4-g32", tokens: int = 3, columns: int = 2048) -> Case:
    """The columns are divided among several programs, whose parts are added."""
    scheme = scheme_of(name, columns)
    weight, x = random_weight(scheme, 192, columns), normal(rng, tokens, columns, dtype=BF16)
    values = f64(dequantise(weight, scheme).to(BF16))

    def check(actual: torch.Tensor) -> None:
        assert_within(actual, f64(x) @ values.T, 2 * columns * U32 * (f64(x).abs() @ values.abs().T))

    op = module_of("packed_linear").packed_linear
    return Case(lambda: op(x, weight, scheme), check, SCHEDULES[:2])


def fused_experts(rng: torch.Generator) -> Case:
    """Experts in bf16."""
    hidden, inner, experts = 512, 256, 4
    x, weights = normal(rng, 2, hidden, scale=0.1, dtype=BF16), torch.rand(2, 2, generator=rng)
    w13 = normal(rng, experts, 2 * inner, hidden, scale=hidden**-0.5, dtype=BF16)
    w2 = normal(rng, experts, hidden, inner, scale=inner**-0.5, dtype=BF16)
    given = x, w13, w2, weights, torch.tensor([[3, 0], [3, 1]])
    op = module_of("fused_experts").fused_experts
    expected = experts_in_fp64(*given, 10.0)
    return Case(lambda: op(*given, swiglu_limit=10.0), lambda out: check_experts(out, expected, x), SCHEDULES[:2])


def sparse_attention(rng: torch.Generator) -> Case:
    """An HCA layer decodes one token at position 8191: 128 window rows and 64 entries in fp8, 64 heads."""
    fmt, position, ratio = RowFormat.fp8(DIM, ROPE), 8191, 128
    count = (position + 1) // ratio
    q, sinks = normal(rng, 1, HEADS, DIM, dtype=BF16), normal(rng, HEADS)
    entries, window = make_cache(fmt, 2, [count], rng, CPU), make_cache(fmt, 64, [WINDOW], rng, CPU)
    rows = torch.cat((window.put(0, normal(rng, WINDOW, DIM)), entries.put(0, normal(rng, count, DIM))))
    # The window's last pages alone are read; those before them are the null page.
    before = (position + 1 - WINDOW) // 64
    table = torch.nn.functional.pad(window.rows.block_table, (before, 0))
    window_rows = PagedRows(window.rows.pages, 64, fmt, table)
    expected, bound = attend(f64(q)[0], rows, f64(sinks), DIM**-0.5, BF16)
    op = module_of("sparse_attention").sparse_attention

    def compute() -> torch.Tensor:
        return op(
            q, sinks, torch.tensor([position]), torch.tensor([0], dtype=torch.int32), window_rows,
            window_size=WINDOW, scale=DIM**-0.5, entries=entries.rows, ratio=ratio, max_entries=count,
        )  # fmt: skip

    return Case(compute, lambda actual: assert_within(actual[0], expected, bound), SCHEDULES[:2])


def indexer_topk(rng: torch.Generator) -> Case:
    """The best 512 of 700 fp8 keys for two tokens; whole numbers, whose scores are exact, with many ties."""
    visible, topk, heads, dim = (700, 600), 512, 64, 128
    cache = make_cache(RowFormat.fp8(dim), 64, [max(visible)], rng, CPU)
    keys = f64(cache.put(0, integers(rng, -2, 2, max(visible), dim)))
    q, weights = integers(rng, -2, 2, 2, heads, dim, dtype=BF16), integers(rng, -4, 4, 2, heads)
    cos_sin = torch.cat((torch.ones(2, ROPE // 2), torch.zeros(2, ROPE // 2)), dim=1)
    scores = (torch.einsum("thd,sd->ths", f64(q), keys).clamp(min=0) * f64(weights)[..., None]).sum(1)
    best = [scores[t, :n].argsort(descending=True, stable=True)[:topk].sort().values for t, n in enumerate(visible)]
    op = module_of("indexer_topk").indexer_topk

    def compute() -> torch.Tensor:
        return op(
            q, cos_sin, weights, cache.rows, torch.tensor([4 * n - 1 for n in visible]),
            torch.zeros(2, dtype=torch.int32), ratio=4, topk=topk, max_entries=max(visible), scale=1.0,
        )  # fmt: skip

    def check(actual: torch.Tensor) -> None:
        assert torch.equal(actual.long(), torch.stack(best))

    return Case(compute, check, SCHEDULES[:2])


def packed_experts(rng: torch.Generator, name: str = "int4-g32") -> Case:
    """Two tokens of a decoding step; fewer rows and columns than Flash has, in the same tiles."""
    hidden, inner, experts = 1024, 256, 4
    scheme13, scheme2 = scheme_of(name, hidden), scheme_of(name, inner)
    w13 = stacked([random_weight(scheme13, inner, hidden) for _ in range(2 * experts)], experts, 2)
    w2 = stacked([random_weight(scheme2, hidden, inner) for _ in range(experts)], experts)
    x, weights = normal(rng, 2, hidden, scale=0.1, dtype=BF16), torch.rand(2, 2, generator=rng)
    ids = torch.tensor([[3, 0], [3, 1]])
    dense13, dense2 = dense(w13, scheme13, BF16).flatten(1, 2), dense(w2, scheme2, BF16)
    expected = experts_in_fp64(x, dense13, dense2, weights, ids, 10.0)
    op = module_of("packed_experts").packed_experts

    def compute() -> torch.Tensor:
        return op(x, w13, w2, scheme13, scheme2, weights, ids, swiglu_limit=10.0)

    # Roundings of independent signs add up to more than 7 times the root of the sum of their squares in one of 10^10
    # sums (Hoeffding); the bound of `check_experts`, their sum, lets products of the wrong columns pass.
    squares = torch.zeros(2, hidden, dtype=torch.float64)
    for t, k in itertools.product(range(2), repeat=2):
        e = int(ids[t, k])
        gate, up = (f64(dense13[e]) @ f64(x[t])).chunk(2)
        activation = float(weights[t, k]) * torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)
        squares[t] += f64(dense2[e]).square() @ activation.square()
    spread = 7 * (3 * U[BF16] + 2 * FUNCTION) * squares.sqrt()

    def check(actual: torch.Tensor) -> None:
        check_experts(actual, expected, x)
        assert_within(actual, expected[0], spread)

    return Case(compute, check, SCHEDULES[:2])


SM_80, SM_90 = 80, 90
CASES: dict[str, tuple[Any, ...]] = {
    "rms_norm, width 512": (rms_norm, SM_80, SM_90),
    "rms_norm, width 1024": (partial(rms_norm, width=1024), SM_80, SM_90),
    "rms_norm, width 4096": (partial(rms_norm, width=4096), SM_80, SM_90),
    "route": (route, SM_80, SM_90),
    "mhc_pre": (mhc_pre, SM_80),
    "mhc_post": (mhc_post,),
    "swiglu": (swiglu, SM_80),
    "rope_table": (rope_table, SM_80),
    "sparse_attention, fp8 rows": (sparse_attention, SM_80, SM_90),
    "indexer_topk, fp8 keys": (indexer_topk, SM_80),
    "packed_experts, int4": (packed_experts, SM_80),
    "packed_experts, fp4": (partial(packed_experts, name="fp4"), SM_90),
    "packed_linear, int4": (packed_linear, SM_80),
    "packed_linear, int4, 70 tokens": (partial(packed_linear, tokens=70),),
    "packed_linear, fp4": (partial(packed_linear, name="fp4"),),
    "fused_experts": (fused_experts,),
}
"""What is computed, and for which architectures in the ordinary run."""
